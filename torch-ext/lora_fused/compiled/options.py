"""How the merge of siblings reaches Inductor: without options of the user's, and by `compile_options`."""

from __future__ import annotations

import sys
from typing import Any

from ..backends import native
from ..functional.checks import shown


def compile_options(mode: str | None = None) -> dict[str, Any]:
    """Options for `torch.compile`, which takes options or a mode and not both: a mode's options, and the pass that
    merges the native calls of linears with one input, where the variant has native ops.

        model.compile(options=lora_fused.compile_options("max-autotune"))

    Inductor runs the pass without options too. They say so explicitly, where a configuration is written down or where
    `torch._inductor.config.pattern_matcher` is off; both together do no more than one.

    Args:
        mode: a mode of `torch.compile`, one of `torch._inductor.list_mode_options()`; None for the pass alone.

    Raises:
        ValueError: the mode is none of them.
    """
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode is not None and (not isinstance(mode, str) or mode not in modes):
        raise ValueError(f"mode: {shown(mode)}, expected None or one of {', '.join(map(repr, modes))}")
    options = dict(modes[mode]) if mode is not None else {}
    if native.available:
        from .inductor import the_pass

        options["joint_custom_pre_pass"] = the_pass
    return options


def register_pass() -> None:
    """Lets Inductor merge, once it is there: it runs its passes on what was traced before."""
    if native.available and "torch._inductor.compile_fx" in sys.modules:
        from .inductor import register

        register()
