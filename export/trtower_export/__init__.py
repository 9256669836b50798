"""Turn a checkpoint into a bundle. This side of trtower runs on the build machine.

    from trtower_export import ExportOptions, export_tower
    bundle = export_tower("openai/clip-vit-large-patch14-336", options=ExportOptions(precision="auto"))
    assert bundle.manifest.certificate.passed

To read the code, start at pipeline.py. Public names are imported on first use: the command loads this package on every
call, and most calls need neither transformers nor onnx.
"""

from typing import TYPE_CHECKING

from trtower.lazy import import_lazily

if TYPE_CHECKING:
    from trtower_export.check.certify import check_bundle
    from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from trtower_export.options import ExportOptions
    from trtower_export.pipeline import export_tower
    from trtower_export.plan.build import add_plan

__all__ = ["Checkpoint", "ExportOptions", "add_plan", "check_bundle", "export_tower", "open_checkpoint"]

if not TYPE_CHECKING:  # or a type checker would accept every name
    __getattr__, __dir__ = import_lazily(
        __name__,
        {
            "check.certify": "check_bundle",
            "checkpoint.checkpoint": "Checkpoint open_checkpoint",
            "options": "ExportOptions",
            "pipeline": "export_tower",
            "plan.build": "add_plan",
        },
    )
