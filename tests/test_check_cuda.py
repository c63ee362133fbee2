"""What is seen in a CUDA library's machine code, told by a cuobjdump that answers as CUDA's does."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import check_cuda

PLAIN = "_ZN12_GLOBAL__N_111cast_kernelEPfi"
HOPPER = "_ZN10lora_fused4sm9011gemm_kernelIfLi2EEEvT_"
FINISH = "_ZN10lora_fused4sm9013finish_kernelEPf"
USAGE = {("sm_80", PLAIN): 0, ("sm_90a", PLAIN): 0, ("sm_90a", HOPPER): 16, ("sm_90a", FINISH): 0}
SASS = {PLAIN: "HMMA.16816", HOPPER: "HGMMA.64x64x16", FINISH: "FADD"}


@pytest.fixture
def problems(tmp_path):
    """Writes a cuobjdump that answers as given, and gives `check` of what it says."""

    def told(usage=USAGE, sass=SASS, archs=("8.0", "9.0a")):
        lines = []
        for arch in dict.fromkeys(arch for arch, _ in usage):
            lines += ["Fatbin elf code:", f"arch = {arch}"]
            for (of, kernel), stack in usage.items():
                if of == arch:
                    lines += [f" Function {kernel}:", f"  REG:96 STACK:{stack} SHARED:0 LOCAL:0"]
        (tmp_path / "usage").write_text("\n".join(lines))
        (tmp_path / "sass").write_text(
            "".join(f"\t\tFunction : {k}\n  /*0000*/ {code} R1 ;\n" for k, code in sass.items())
        )
        tool = tmp_path / "cuobjdump"
        tool.write_text(f'#!/bin/sh\ncase "$1" in -res-usage) cat {tmp_path}/usage;; *) cat {tmp_path}/sass;; esac\n')
        tool.chmod(0o755)
        return check_cuda.check(str(tool), tmp_path / "lib.so", list(archs))

    return told


def test_what_should_be_passes(problems):
    assert problems() == []


def test_missing_architecture(problems):
    (problem,) = problems(archs=("8.0", "9.0a", "12.0"))
    assert "'sm_120'" in problem and "build again" in problem


def test_kernel_missing_on_one_architecture(problems):
    usage = {key: value for key, value in USAGE.items() if key != ("sm_80", PLAIN)} | {("sm_80", PLAIN + "v"): 0}
    assert any("is not built for sm_80" in problem and PLAIN in problem for problem in problems(usage))


def test_spilled_registers_beyond_the_list(problems):
    assert check_cuda.STACK_BYTES["gemm_kernel"] == {"sm_90a": 16}
    (problem,) = problems(USAGE | {("sm_90a", HOPPER): 24})
    assert "lora_fused::sm90::gemm_kernel uses 24 bytes of stack on sm_90a" in problem
    (problem,) = problems(USAGE | {("sm_80", PLAIN): 8})
    assert "(anonymous)::cast_kernel uses 8 bytes of stack on sm_80" in problem


def test_hopper_kernel_without_its_tensor_cores(problems):
    (problem,) = problems(sass=SASS | {HOPPER: "HMMA.16816"})
    assert "lora_fused::sm90::gemm_kernel multiplies without HGMMA" in problem
    (problem,) = problems({("sm_90a", PLAIN): 0}, archs=("9.0a",))
    assert "no kernel of a namespace sm90" in problem


def test_cuobjdump_that_fails(problems, tmp_path):
    problems()
    (tmp_path / "cuobjdump").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match="failed"):
        check_cuda.check(str(tmp_path / "cuobjdump"), tmp_path / "lib.so", ["8.0"])
