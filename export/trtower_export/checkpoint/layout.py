"""What was asked of a checkpoint, and what was recognised in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trtower.layer_codes import LayerCode
from trtower_export.checkpoint.tensors import Tensors
from trtower_export.families import Family
from trtower_export.options import Trust


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to look for: with its ``weights`` or as a rehearsal, and which ``tower`` if there are several."""

    trust: Trust = field(default_factory=Trust)
    weights: bool = True
    tower: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was recognised. ``tensors`` are the tower's, their names beginning with ``root``; None for a rehearsal.

    ``select_layer`` and ``select_feature`` are what the config says, None where it says nothing; a model that reads
    a layer of its own choosing and does not say which has ``unsaid``. ``said_as`` is the field of config.json that
    names the layer, and ``drops_first`` the setting with which eager code drops a tower's first token. A
    ``contrastive`` model reads one pooled vector of an image and no hidden state. ``image_aspect_ratio`` is the
    config's word for pictures that are padded or tiled before they are prepared. ``remarks`` are said by an export.
    """

    kind: str
    config: Any
    family: Family
    preprocessor: dict[str, Any] | None
    tensors: Tensors | None = None
    root: str = ""
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    select_layer: LayerCode | None = None
    select_feature: str | None = None
    said_as: str = "mm_vision_select_layer"
    unsaid: bool = False
    drops_first: str | None = None
    contrastive: bool = False
    image_aspect_ratio: str | None = None
    remarks: tuple[str, ...] = ()
