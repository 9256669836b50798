"""What was asked of a checkpoint and what was recognised in it, with the tensors of its tower.

Tensors are put in once it is certain that they are the tower that people run: adapters that were not merged and
wrappers that are not known would make another tower of the same names.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from trtower.errors import CheckpointError
from trtower.layer_codes import LayerCode
from trtower_export.checkpoint import adapters
from trtower_export.checkpoint.files import Files
from trtower_export.checkpoint.not_checkpoints import checkpoints_in, unfinished_in
from trtower_export.checkpoint.tensors import Tensors
from trtower_export.checkpoint.wrapped_names import refuse_unknown_wrapper, unknown_wrapper, wrappers_in
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

    ``said_as`` is the field of config.json that names the layer that the model reads, None if it reads none.
    ``select_layer`` and ``select_feature`` are what the config says, None where it says nothing, and ``drops_first``
    the setting with which eager code drops a tower's first token. A ``contrastive`` model reads one pooled vector of an
    image and no hidden state. ``image_aspect_ratio`` is the config's word for pictures that are padded or tiled before
    they are prepared. ``remarks`` are said by an export.
    """

    kind: str
    config: Any
    family: Family
    preprocessor: dict[str, Any] | None
    tensors: Tensors | None = None
    root: str = ""
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    said_as: str | None = None
    select_layer: LayerCode | None = None
    select_feature: str | None = None
    drops_first: str | None = None
    contrastive: bool = False
    image_aspect_ratio: str | None = None
    remarks: tuple[str, ...] = ()


def with_tower(
    layout: Layout, tensors: Tensors, patch_embedding: str, request: Request, *, larger: bool
) -> Layout | None:
    """Return a layout with the tower's tensors, of those of a whole checkpoint; None if it holds no such tower.

    ``larger`` says whether the checkpoint is of more than its tower. Raises CheckpointError if there are several towers
    to choose from, or if an adapter or a wrapper may have changed this one.
    """
    files = tensors.files
    if not tensors.shards:
        adapters.refuse_adapter_alone(files)
    remarks = adapters.check_unmerged(tensors, patch_embedding, larger=larger)
    root = tensors.root(patch_embedding, request.tower)
    if root is None:
        return None
    refuse_unknown_wrapper((name for name in tensors.shards if name.startswith(root)), root, files.folder)
    tower = tensors.select(root)
    remarks += adapters.check_adapter(files, tower, tensors.shards.keys() - tower.shards.keys(), larger=larger)
    if wrappers := wrappers_in(tower.written):
        remarks += (f"removed from the names of the tower's tensors: {', '.join(wrappers)}, which only wrap modules",)
    return replace(layout, tensors=tower, root=root, remarks=(*layout.remarks, *remarks))


def inside_model(layout: Layout, files: Files, others: Collection[str]) -> Layout:
    """Add what is to be said of the adapters of the model around a tower, which lies in a folder of its own.

    ``others`` are the names of the model's own tensors. Raises CheckpointError if an adapter may be of the tower.
    """
    if layout.tensors is None:
        return layout
    remarks = adapters.check_adapter(files, layout.tensors, others, larger=True)
    return replace(layout, remarks=(*layout.remarks, *remarks))


def no_tower(tensors: Tensors, expected: str) -> CheckpointError:
    """Make the error for a checkpoint without a tower; ``expected`` says what there should be."""
    folder, why = tensors.files.folder, ""
    if (wrapped := next(filter(unknown_wrapper, tensors.shards), None)) is not None:
        why = (
            f" Some of its tensors are inside a wrapper that is not known here, {wrapped} among them: save the model "
            "that it wraps with save_pretrained(), and export that."
        )
    elif not tensors.shards and (unfinished := unfinished_in(folder)):
        why = f" The download of {unfinished} was interrupted: download it again."
    elif not tensors.shards and (inner := checkpoints_in(folder)):
        why = f" Is it one of the folders inside: {', '.join(map(str, inner[:5]))}?"
    return CheckpointError(f"{folder} holds no weights of {expected}.{why}")
