"""A bundle on Ray Serve, for many machines. Start at deployment.py.

The first use of a name raises MissingExtraError without the extra ``ray``.
"""

from typing import TYPE_CHECKING

from trtower.lazy import import_lazily

if TYPE_CHECKING:
    from trtower.serving.ray.deployment import TowerDeployment, application, bind_tower
    from trtower.serving.ray.open_inference import add_open_inference
    from trtower.serving.ray.options import RayOptions

__all__ = ["RayOptions", "TowerDeployment", "add_open_inference", "application", "bind_tower"]

if not TYPE_CHECKING:  # or a type checker would accept every name
    __getattr__, __dir__ = import_lazily(
        __name__,
        {
            "deployment": "TowerDeployment application bind_tower",
            "open_inference": "add_open_inference",
            "options": "RayOptions",
        },
    )
