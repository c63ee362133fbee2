"""Compiles the embedding's Triton kernels for a GPU, on a machine without one: every operand that may be
None, in a process of its own, since the interpreter that the other tests use skips what is not run.

python tests/helpers/compile_embedding.py BUILD
"""

import itertools
import pathlib
import sys

import torch
import triton
from kernels import get_local_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
OPTIONS = ("num_warps", "num_stages", "sanitize_overflow")


class Recorder:
    """Stands where a kernel does and keeps what it is launched with."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, args, kwargs))


def compile_call(kernel, args, kwargs) -> None:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    names = kernel.arg_names
    constants = {name: value for name, value in zip(names, args) if value is None} | kwargs
    signature = {}
    for name, value in (*zip(names, args), *kwargs.items()):
        number = "fp32" if isinstance(value, float) else "i32"
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else number
    signature.update(dict.fromkeys(constants, "constexpr"))
    at = {(names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, at, {}), target=GPUTarget("cuda", 90, 32), options=options)


def main() -> None:
    lora_fused = get_local_kernel(pathlib.Path(sys.argv[1]))
    EmbeddingOperands, EmbeddingSpec = lora_fused.specs.EmbeddingOperands, lora_fused.specs.EmbeddingSpec
    ops, calls = lora_fused.backends.select.get("triton"), []
    for name in ("gather_add", "gather_backward", "column_norm"):
        module = sys.modules[f"{ops.__name__}.{name}"]
        for kernel in [attribute for attribute in vars(module) if attribute.endswith("d_kernel")]:
            setattr(module, kernel, Recorder(getattr(module, kernel), calls))
    v, h, r, m = 40, 64, 8, 30
    ids, spec = torch.zeros(m, dtype=torch.int32), EmbeddingSpec(0.7, None, 1.0, "triton")
    # Which of A, B and the magnitude are trained.
    trained = [needs for needs in itertools.product((False, True), repeat=3) if any(needs)]
    for dora, (a, b, magnitude) in itertools.product((False, True), trained):
        if magnitude and not dora:
            continue
        vector = torch.zeros(h) if dora else None
        scale = torch.ones((), dtype=torch.bfloat16) if b else None
        table = EmbeddingOperands(
            torch.zeros(v, h, dtype=torch.bfloat16), torch.zeros(r, v), torch.zeros(h, r), vector, scale
        )
        keep = b or magnitude
        ops.gather_add(ids, table, spec, vector, keep)
        rows = torch.zeros(m, r, dtype=torch.bfloat16) if keep else None
        dy, needs = torch.zeros(m, h, dtype=torch.bfloat16), EmbeddingOperands(False, a, b, magnitude, False)
        ops.gather_backward(dy, ids, rows, table, spec, vector, vector, needs)
    for dtype in (torch.float32, torch.bfloat16):
        ops.column_norm(torch.zeros(v, h, dtype=torch.bfloat16), torch.zeros(r, v), torch.zeros(h, r, dtype=dtype), 0.7)
    for call in calls:
        compile_call(*call)
    print(f"compiled {len(calls)}")


if __name__ == "__main__":
    main()
