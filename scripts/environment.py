#!/usr/bin/env python3
"""What a bug report should say of the machine, without names of users, paths or tokens.

    python -m scripts.environment

It needs no package but those that are there, and imports none but torch.
"""

import importlib.metadata
import os
import platform

PACKAGES = (
    "torch",
    "triton",
    "kernels",
    "huggingface_hub",
    "peft",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "numpy",
)
# Variables that change what is loaded; of those with a path only that they are set.
VARIABLES = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "TRITON_INTERPRET", "USE_HUB_KERNELS")
WITH_PATHS = ("LOCAL_KERNELS", "KERNELS_CACHE", "HF_HOME", "LD_LIBRARY_PATH", "PYTHONPATH")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """torch's build, and each GPU that it sees with its compute capability."""
    try:
        import torch
    except Exception as error:  # a report of a broken installation is a report, too
        return [f"torch cannot be imported: {type(error).__name__}: {error}"]
    lines = [f"torch {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"GPU {index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    return lines if len(lines) > 1 else [*lines, "no GPU that torch sees"]


def report() -> str:
    libc = " ".join(platform.libc_ver()) or "no glibc"
    lines = [f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {libc}", *devices()]
    lines += [f"{package} {version(package)}" for package in PACKAGES]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    lines += [f"{name} is set" for name in WITH_PATHS if name in os.environ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
