#!/usr/bin/env python3
"""Look at the machine code (SASS) of every CUDA variant in build/, on a machine without a GPU.

    python scripts/check_cuda.py [--build DIR]

Each architecture of metadata.json is there and no other; all have the same kernels but Hopper's, each of which
multiplies by HGMMA; and no kernel keeps more of its registers in memory than STACK_BYTES lists. Each problem is one
line, and the exit status is 1 where there is one. cuobjdump is CUDA's, or the one in Triton's wheel.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOPPER = "sm_90a"
# Hopper's kernels are those of namespace sm90; these of them only add up what others multiplied.
ONLY_ADD = re.compile(r"::finish\w*$")
# Bytes of stack that a kernel may use by architecture, any other kernel none: registers that did not fit, and arrays
# with an index that is not known. As nvcc 13.0 compiles them.
STACK_BYTES = {
    "adapter_grad_bwd_kernel": {"sm_80": 8, "sm_86": 8, "sm_89": 8, "sm_90a": 24, "sm_100": 216, "sm_120": 320},
    "dropped_expand_add_bwd_kernel": {"sm_80": 16, "sm_86": 16, "sm_89": 16, "sm_90a": 16, "sm_120": 8},
    "gated_activation_kernel": {
        **dict.fromkeys(("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100"), 64),
        "sm_120": 56,
    },
    "gemm_group_kernel": {"sm_90a": 8},
    "gemm_kernel": {"sm_90a": 16},
    "scale_output_bwd_kernel": {
        "sm_75": 72,
        "sm_80": 32,
        "sm_86": 32,
        "sm_89": 32,
        "sm_90a": 32,
        "sm_100": 32,
        "sm_120": 16,
    },
    "shrink_fwd_kernel": {"sm_80": 16, "sm_86": 8, "sm_89": 8, "sm_90a": 8, "sm_100": 24, "sm_120": 32},
    "skinny_kernel": {"sm_90a": 56},
}


def cuobjdump() -> str | None:
    """CUDA's, else Triton's."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec else ""
    return next(
        (p for folder in (None, f"{home}/bin", str(triton)) if (p := shutil.which("cuobjdump", path=folder))), None
    )


def run(tool: str, *arguments: str):
    """Lines of cuobjdump's output, as they come: disassembled, a library is hundreds of megabytes."""
    # nvdisasm, which cuobjdump calls, lies beside it.
    env = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryFile("w+") as said:  # warnings of nvdisasm's, a line a kernel, unless it fails
        with subprocess.Popen([tool, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=said) as process:
            yield from process.stdout
        if process.returncode != 0:
            said.seek(0)
            sys.exit(f"{said.read()}check-cuda: failed: {tool} {' '.join(arguments)}")


def stacks(tool: str, library: Path) -> dict[str, dict[str, int]]:
    """By architecture and kernel (mangled): bytes of stack."""
    found, arch, kernel = defaultdict(dict), "", ""
    for line in run(tool, "-res-usage", str(library)):
        if told := re.match(r"arch = (sm_\w+)", line):
            arch = told[1]
        elif told := re.match(r"\s*Function (\S+):$", line):
            kernel = told[1]
        elif told := re.search(r"\bSTACK:(\d+)", line):
            found[arch][kernel] = int(told[1])
    return found


def multiplying(tool: str, library: Path) -> set[str]:
    """Hopper's kernels (mangled) with an HGMMA instruction."""
    found, kernel = set(), ""
    for line in run(tool, "-sass", "-arch", HOPPER, str(library)):
        if told := re.match(r"\s*Function : (\S+)", line):
            kernel = told[1]
        elif "HGMMA" in line:
            found.add(kernel)
    return found


def readable(kernels: set[str]) -> dict[str, str]:
    """Each mangled name's function, namespaces and all, without its template arguments."""
    order = sorted(kernels)
    done = subprocess.run(["c++filt"], input="\n".join(order), text=True, capture_output=True, check=True)
    names = {}
    for mangled, full in zip(order, done.stdout.splitlines()):
        full = re.sub(r"_GLOBAL__N__\w+|\(anonymous namespace\)", "(anonymous)", full.removeprefix("void "))
        names[mangled] = re.match(r"(?:\(anonymous\)|[\w:])+", full)[0]
    return names


def check(tool: str, library: Path, archs: list[str]) -> list[str]:
    """Problems of one library built for these compute capabilities ("9.0a")."""
    wanted = {"sm_" + arch.replace(".", "") for arch in archs}
    found = stacks(tool, library)
    if set(found) != wanted:
        return [f"holds machine code for {sorted(found)}, and metadata.json lists {sorted(wanted)}: build again"]
    names, problems = readable({kernel for kernels in found.values() for kernel in kernels}), []
    hopper = {kernel for kernel, name in names.items() if "::sm90::" in name}
    everywhere = set(names) - hopper
    for arch, kernels in sorted(found.items()):
        for kernel in sorted(everywhere - set(kernels)):
            problems.append(f"{names[kernel]} is not built for {arch}: {kernel}")
        spilling = defaultdict(int)
        for kernel, stack in kernels.items():
            spilling[names[kernel]] = max(spilling[names[kernel]], stack)
        for name, stack in sorted(spilling.items()):
            if stack > STACK_BYTES.get(name.rpartition("::")[2], {}).get(arch, 0):
                problems.append(f"{name} uses {stack} bytes of stack on {arch}, more than STACK_BYTES lists: free "
                                "registers, or list it")  # fmt: skip
    if HOPPER in found:
        if not hopper:
            problems.append("has no kernel of a namespace sm90, where Hopper's are looked for")
        without = {k for k in hopper & set(found[HOPPER]) if not ONLY_ADD.search(names[k])}
        for kernel in sorted(without - multiplying(tool, library)):
            problems.append(f"{names[kernel]} multiplies without HGMMA on {HOPPER}: {kernel}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="the folder of variants")
    args = parser.parse_args()
    variants = sorted(path for path in args.build.glob("*-cu1*") if path.is_dir())
    if not variants:
        sys.exit(f"check-cuda: no CUDA variant in {args.build}: make build-cuda")
    tool = cuobjdump()
    if tool is None:
        sys.exit("check-cuda: no cuobjdump in PATH, in CUDA_HOME or in a Triton wheel")
    failed = False
    for variant in variants:
        archs = json.loads((variant / "metadata.json").read_text())["backend"]["archs"]
        problems = check(tool, next(variant.glob("*.so")), archs)
        for problem in problems:
            print(f"{variant.name}: {problem}")
        print(f"{variant.name}: {f'{len(problems)} problems' if problems else 'machine code as it should be'} "
              f"for {', '.join(archs)}")  # fmt: skip
        failed |= bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
