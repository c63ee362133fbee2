"""Compiles the Triton kernels of experts ahead of time, for GPUs that need not be here: what does not compile, needs
more shared memory than a GPU has, or spills registers shows without one.

    python scripts/compile_experts.py            # every tile that benchmarks/tune_experts.py tries
    python scripts/compile_experts.py --arch 90  # one architecture

A line a kernel: architecture, dtype, tile, KiB of shared memory, bytes spilled by a thread, and the instruction that
multiplies.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from kernels import get_local_kernel
from tune_experts import TILES

SHARED = {80: 163, 86: 99, 90: 227}  # KiB that a program may use
STRIDES = {False: ("we", "wn"), True: ("we", "wk")}  # of the weight that are not one


# A case: name, kernel, types of its arguments, constants, tile (rows, columns, depth, warps, stages). A type that ends
# in 16 is of a multiple of it, None is absent, a number is that value.
SIZE = "i3216"


def signatures(module, dtype: str) -> list[tuple]:
    """The cases of every kernel."""
    half = f"*{dtype}1616"
    return [*products(module, half), *outer_and_few(module, half), *passes(module, half)]


def products(module, half: str) -> list[tuple]:
    """Of the grouped product, every tile, and of sizes that are no multiples."""
    grouped = {
        **dict.fromkeys(("x_ptr", "w_ptr", "y_ptr", "t_ptr"), half),
        "order_ptr": "*i6416", "d_ptr": half, "u_ptr": half, "bias_ptr": None, "tiles_ptr": "*i3216", "most": "i32",
        **dict.fromkeys(("N", "K", "R", "stride_we"), SIZE), "per_token": "i32",
    }  # fmt: skip
    found = []
    for transposed in (False, True):
        of_weight = {"stride_wn": 1, "stride_wk": SIZE} if transposed else {"stride_wn": SIZE, "stride_wk": 1}
        for fused in (False, True):
            types = {**grouped, **of_weight}
            if not fused:
                types["d_ptr"] = None
            name = f"grouped_linear{', transposed' if transposed else ''}{', t inside' if fused else ''}"
            for tile in TILES:
                constants = dict(
                    BLOCK_M=tile[0], BLOCK_N=tile[1], BLOCK_K=tile[2], BLOCK_R=16, BAND=8, EVEN_N=True, EVEN_K=True,
                    PRECISION="ieee",
                )  # fmt: skip
                found.append((name, module.grouped_linear.grouped_linear_kernel, types, constants, tile))
    odd = {name: kind.removesuffix("16") if isinstance(kind, str) else kind for name, kind in types.items()}
    odd.update(bias_ptr=half.removesuffix("16"), stride_wn="i32", stride_wk="i32")
    wide = {name: "*fp32" if kind in (half, half.removesuffix("16")) else kind for name, kind in odd.items()}
    constants = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=64, BAND=8, EVEN_N=False, EVEN_K=False)
    for name, each in (("odd sizes", odd), ("odd sizes, float32", wide)):
        kernel, sizes = module.grouped_linear.grouped_linear_kernel, dict(constants, PRECISION="ieee")
        found.append((f"grouped_linear, {name}", kernel, each, sizes, (64, 64, 32, 4, 2)))
    return found


def outer_and_few(module, half: str) -> list[tuple]:
    """Of factors' gradients and of few rows."""
    found = []
    outer = {
        **dict.fromkeys(("short_ptr", "long_ptr"), half), "order_ptr": "*i6416", "routing_ptr": "*fp3216",
        "out_ptr": "*fp3216", "ends_ptr": "*i3216", "scaling": "fp32", "R": SIZE, "L": SIZE, "per_token": "i32",
        "stride_e": 1, "stride_r": SIZE, "stride_l": SIZE,
    }  # fmt: skip
    constants = dict(BY_TOKEN=True, BLOCK_R=16, BLOCK_L=128, BLOCK_S=64, PRECISION="ieee")
    found.append(("grouped_outer", module.grouped_outer.grouped_outer_kernel, outer, constants, (0, 128, 64, 4, 3)))
    few = {
        "x_ptr": half, "index_ptr": "*i6416", "w_ptr": half, "a_ptr": "*fp3216", "b_ptr": "*fp3216", "bias_ptr": half,
        "y_ptr": half, "scaling": "fp32", "S": "i32", **dict.fromkeys(("N", "K", "R", "stride_we", "stride_ae"), SIZE),
        "per_token": "i32", "stride_wn": SIZE, "stride_wk": 1, "stride_ar": SIZE, "stride_ak": 1, "stride_be": 1,
        "stride_bn": SIZE, "stride_br": SIZE, **dict.fromkeys(("limit", "slope", "offset"), "fp32"),
    }  # fmt: skip
    gates = ("halves", False), ("interleaved", True), (None, False), (None, True)
    for (gate, transposed), (columns, depth) in itertools.product(gates, ((64, 128), (128, 64))):
        types = {**few, **({"stride_wn": 1, "stride_wk": SIZE} if transposed else {})}
        constants = dict(
            ACTIVATION="silu" if gate else None, GATED=gate is not None, INTERLEAVED=gate == "interleaved",
            LIMITED=gate == "interleaved", BLOCK_S=64, BLOCK_M=16, BLOCK_N=columns // 2 if gate else columns,
            BLOCK_K=depth, BLOCK_R=16, EVEN_K=True, PRECISION="ieee",
        )  # fmt: skip
        tile = (16, columns, depth, 4, 3)
        found.append((f"few_rows, gate {gate}", module.few_rows.few_rows_kernel, types, constants, tile))
    return found


def passes(module, half: str) -> list[tuple]:
    """Of what multiplies no matrices."""
    found = []
    index = {"index_ptr": "*i6416", "counts_ptr": "*i3216", "S": "i32", "E": SIZE}
    sizes = dict(BLOCK=512, CHUNK=64, BLOCK_E=256)
    found.append(("route: count", module.route.count_kernel, index, sizes, (0, 0, 0, 8, 3)))
    placed = {
        **index, "order_ptr": "*i6416", "place_ptr": "*i3216", "ends_ptr": "*i3216", "tiles_ptr": "*i3216",
        "blocks": "i32", "most": "i32",
    }  # fmt: skip
    found.append(("route: place", module.route.place_kernel, placed, dict(sizes, BLOCK_M=128), (0, 0, 0, 8, 3)))
    combined = {
        "y_ptr": half, "routing_ptr": half, "place_ptr": "*i3216", "index_ptr": None, "ends_ptr": "*i3216",
        "out_ptr": half, "E": SIZE, "N": SIZE,
    }  # fmt: skip
    constants = dict(PER_TOKEN=8, BLOCK_N=1024)
    found.append(("combine_rows", module.combine_rows.combine_rows_kernel, combined, constants, (0, 0, 0, 4, 3)))
    gated = {
        "z_ptr": half, "dh_ptr": half, "routing_ptr": half, "order_ptr": "*i6416", "ends_ptr": "*i3216", "h_ptr": half,
        "dz_ptr": half, "dots_ptr": "*fp3216", **dict.fromkeys(("E", "I", "stride_z", "stride_dh", "stride_dz"), SIZE),
        **dict.fromkeys(("limit", "slope", "offset"), "fp32"),
    }  # fmt: skip
    constants = dict(ACTIVATION="silu", GATED=True, INTERLEAVED=False, LIMITED=False, BLOCK=1024)
    found.append(("expert_gate_bwd", module.expert_gate.expert_gate_bwd_kernel, gated, constants, (0, 0, 0, 4, 3)))
    laid = {
        **dict.fromkeys(("a_ptr", "b_ptr"), "*fp3216"), **dict.fromkeys(("laid_a_ptr", "laid_b_ptr"), half),
        "scaling": "fp32", **dict.fromkeys(("E", "R", "K", "N", "stride_ae", "stride_ar"), SIZE), "stride_ak": 1,
        "stride_be": 1, "stride_br": SIZE, "stride_bn": SIZE,
    }  # fmt: skip
    constants = dict(SKIP_A=False, BLOCK_E=32, BLOCK_L=64)
    found.append(("lay_out", module.factor_layout.lay_out_kernel, laid, constants, (0, 0, 0, 4, 3)))
    return found


def compile_one(kernel, types: dict, constants: dict, tile, arch: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    plain, values, attributes = {}, dict(constants), {}
    for number, name in enumerate(kernel.arg_names):
        kind = types.get(name, "constexpr")
        if kind is None or isinstance(kind, int):
            plain[name], values[name] = "constexpr", kind
        elif kind.endswith(("3216", "6416", "1616")):
            plain[name] = kind[:-2]
            attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            plain[name] = kind
    source = ASTSource(fn=kernel, signature=plain, constexprs=values, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=tile[3], num_stages=tile[4]))


def spilled(cubin: bytes) -> str:
    """Bytes of local memory a thread, as cuobjdump says."""
    from triton import knobs

    tool = pathlib.Path(knobs.nvidia.cuobjdump.path)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return f"{found[1]} registers, {found[2]} on the stack" if found else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--dtype", choices=("bf", "fp"), default="bf")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    args = parser.parse_args()
    import importlib

    package = get_local_kernel(ROOT / "build")
    names = "route", "grouped_linear", "grouped_outer", "few_rows", "combine_rows", "expert_gate", "factor_layout"
    for name in names:
        importlib.import_module(f"{package.__name__}.backends.triton.{name}")
    modules = sys.modules[f"{package.__name__}.backends.triton"]
    failed = 0
    for arch in args.arch:
        for name, kernel, types, constants, tile in signatures(modules, args.dtype):
            if args.only not in name:
                continue
            try:
                made = compile_one(kernel, types, constants, tile, arch)
            except Exception as error:
                failed += 1
                print(f"sm_{arch} {name} {tile}: {type(error).__name__}: {str(error)[-300:]}", flush=True)
                continue
            shared, text = made.metadata.shared / 1024, made.asm["ptx"]
            how = next((each for each in ("wgmma", "mma.sync") if each in text), "no dot")
            copies = len(re.findall(r"cp\.async\.c[ag]", text))
            over = "" if shared <= SHARED[arch] else "  TOO LARGE"
            print(
                f"sm_{arch} {name:36s} {'x'.join(map(str, tile)):18s} {shared:4.0f} KiB{over}  {how:8s} "
                f"{copies:3d} asynchronous copies  {spilled(made.asm['cubin'])}", flush=True,
            )  # fmt: skip
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
