"""The build machine's side of trtower: checkpoint in, bundle out. Start reading at pipeline.py.

The public names are imported when they are first used: the command loads this package for every call, and most calls
need neither transformers nor onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtower_export.check.certify import check_bundle
    from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from trtower_export.options import ExportOptions
    from trtower_export.pipeline import export_tower
    from trtower_export.plan.build import add_plan

__all__ = ["Checkpoint", "ExportOptions", "add_plan", "check_bundle", "export_tower", "open_checkpoint"]

_HOMES = {
    "Checkpoint": "checkpoint.checkpoint",
    "ExportOptions": "options",
    "add_plan": "plan.build",
    "check_bundle": "check.certify",
    "export_tower": "pipeline",
    "open_checkpoint": "checkpoint.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
