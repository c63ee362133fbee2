"""dequantize_4bit on a GPU, small and odd, bit for bit as the formula: for compute-sanitizer.

No library but torch is needed: the packed weight and its scales are drawn at random.
"""

from __future__ import annotations

import itertools
import pathlib

import torch
from kernels import get_local_kernel

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPES = ((1, 1), (3, 5), (33, 17), (64, 129), (70, 260), (1, 8192), (5, 8193), (24, 4096))


def draw(lora_fused, shape, blocksize, nested, fp4):
    """(operands, description) of random codes and scales."""
    values = shape[0] * shape[1]
    blocks = -(-values // blocksize)
    packed = torch.randint(0, 256, ((values + 1) // 2,), dtype=torch.uint8, device="cuda")
    more = {"absmax": torch.rand(blocks, device="cuda")}
    if nested:
        more = {
            "absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"),
            "nested_absmax": torch.rand(-(-blocks // 256), device="cuda"),
            "nested_code": torch.randn(256, device="cuda"),
            "offset": torch.tensor(0.3, device="cuda"),
        }
    spec = lora_fused.specs.FourBit(shape, blocksize, 256 if nested else 0, fp4, torch.bfloat16)
    return lora_fused.Operands(packed, **more), spec


def main() -> None:
    lora_fused = get_local_kernel(ROOT / "build")
    torch.manual_seed(0)
    for shape, blocksize, nested, fp4 in itertools.product(SHAPES, (32, 64, 4096), (False, True), (False, True)):
        operands, spec = draw(lora_fused, shape, blocksize, nested, fp4)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for first in (0, 8, 34):
                count = shape[0] * shape[1] - first
                if count <= 0:
                    continue
                ours, formula = (torch.full((count,), float("nan"), dtype=dtype, device="cuda") for _ in range(2))
                lora_fused.backends.select.dequantize_4bit(operands, spec, first, ours)
                lora_fused.backends.reference.dequantize_4bit(operands, spec, first, formula)
                assert torch.equal(ours, formula), (shape, blocksize, nested, fp4, dtype, first)
    torch.cuda.synchronize()
    print("dequantize_4bit: the formula's bits")


if __name__ == "__main__":
    main()
