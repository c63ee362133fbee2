"""Our forwards on a model: bound, taken away, and bound by a trainer."""

from .adapted import kernelize_adapted
from .apply import apply, restore

__all__ = ["apply", "kernelize_adapted", "restore"]
