"""Our forwards on a model: bound, taken away, and bound by a trainer."""

from .adapted import kernelize_adapted
from .apply import apply, restore
from .callback import LoraFusedCallback

__all__ = ["LoraFusedCallback", "apply", "kernelize_adapted", "restore"]
