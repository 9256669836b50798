"""Turn a checkpoint into a bundle. This side of trtower runs on the build machine.

    from trtower_export import ExportOptions, export_tower
    bundle = export_tower("openai/clip-vit-large-patch14-336", options=ExportOptions(precision="auto"))
    assert bundle.manifest.certificate.passed

To read the code, start at pipeline.py. Public names are imported on first use: the command loads this package on every
call, and most calls need neither transformers nor onnx.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trtower.errors import MissingExtraError
from trtower.extras import extra_of, how_to_install

if TYPE_CHECKING:
    from trtower_export.check.certify import check_bundle
    from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from trtower_export.options import ExportOptions
    from trtower_export.pipeline import export_tower
    from trtower_export.plan.build import add_plan

__all__ = ["Checkpoint", "ExportOptions", "add_plan", "check_bundle", "export_tower", "open_checkpoint"]

if not TYPE_CHECKING:  # or a type checker would accept every name
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
        try:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        except ModuleNotFoundError as err:
            if err.name and (extra := extra_of(err.name)):
                raise MissingExtraError(
                    f"trtower_export.{name} needs the package {err.name}, which is not installed: "
                    f"{how_to_install(extra)}"
                ) from err
            raise

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
