"""Import one build variant as a stranger's process would, and print as JSON what that did.

    python bare_import.py VARIANT_FOLDER

peft, triton and numpy are absent, an audit hook watches what the import does, and a network is not asked for. Its own
process, with an empty home, is the caller's to give. The answer: `effects`, what the import did beyond reading and
defining; `ops`, the operators it registered, each with the devices it has a kernel for; `error`, where the import or a
first product on the CPU failed; `no_torch`, where torch itself cannot be imported.
"""

import importlib.util
import json
import os
import sys
import threading
import warnings
from pathlib import Path

ABSENT = ("peft", "triton", "numpy")
# Audit events of files, processes, sockets and the environment that no import needs.
WATCHED = (
    "os.chdir", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.link", "os.mkdir",
    "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system",
    "os.truncate", "os.unsetenv", "shutil.", "signal.", "socket.", "subprocess.Popen", "tempfile.", "urllib.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DEVICES = ("CPU", "CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


class Absent:
    """A finder that makes modules look as if they were not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def settings(torch):
    """What an import could change for everybody else."""
    return {
        "the environment": dict(os.environ),
        "the folder": os.getcwd(),
        "the import path": list(sys.path),
        "threads": sorted(str(thread.ident) for thread in threading.enumerate()),
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's thread count": torch.get_num_threads(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's random state": torch.get_rng_state().tolist(),
    }


def use(torch, module):
    """One LoRA on the CPU, forward and backward, against its formula."""
    generator = torch.Generator().manual_seed(0)
    x, w, a, b = (torch.randn(*shape, generator=generator) for shape in ((5, 12), (7, 12), (3, 12), (7, 3)))
    grads = []
    for function in (module.lora_linear, lambda x, w, a, b, s: x @ w.T + s * (x @ a.T) @ b.T):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w, a, b)]
        y = function(*leaves, 0.5)
        grads.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, formula in zip(*grads):
        torch.testing.assert_close(ours, formula, rtol=1e-4, atol=1e-4)


def main():
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, Absent)
    try:
        import torch
    except (ImportError, OSError) as failure:
        print(json.dumps({"no_torch": str(failure)}))
        return

    variant = Path(sys.argv[1]).resolve()
    name = json.loads((variant / "metadata.json").read_text())["id"]
    effects, watching = [], True

    def hook(event, arguments):
        if not watching:
            return
        if event == "open":
            if isinstance(arguments[2], int) and arguments[2] & WRITING:
                effects.append(f"opened {arguments[0]} to write")
        elif event.startswith(WATCHED):
            effects.append(f"{event}{arguments!r:.120}")

    before, ops_before = settings(torch), set(torch._C._dispatch_get_all_op_names())
    sys.addaudithook(hook)
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    error = None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        try:
            spec.loader.exec_module(module)
        except Exception as failure:
            error = failure
        effects += ["changed the warning filters"] * (warnings.filters != filters)
    watching = False
    after, new_ops = settings(torch), set(torch._C._dispatch_get_all_op_names()) - ops_before
    effects += [f"warned: {warning.message}" for warning in seen]
    effects += [f"changed {what}" for what in before if after[what] != before[what]]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = {op: [device for device in DEVICES if has_kernel(op, device)] for op in sorted(new_ops)}
    if error is None:
        try:
            use(torch, module)
        except Exception as failure:
            error = failure
    error = error and f"{type(error).__name__}: {error}"
    print(json.dumps({"error": error, "effects": effects, "ops": ops}))


if __name__ == "__main__":
    main()
