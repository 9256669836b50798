"""The request for a checkpoint, and the layout that was recognised in it, with the tensors of its tower.

A layout gets its tensors only if they are certainly the tower that people run: an unmerged adapter or an unknown
wrapper would make another tower under the same names.
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
from trtower_export.checkpoint.tensors import PICKLE, Tensors
from trtower_export.checkpoint.wrapped_names import refuse_unknown_wrapper, unknown_wrapper, wrappers_in
from trtower_export.families import Family
from trtower_export.options import Trust


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to look for: a checkpoint with its ``weights`` or a rehearsal, and which ``tower`` if there are several."""

    trust: Trust = field(default_factory=Trust)
    weights: bool = True
    tower: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was recognised in a checkpoint.

    Attributes:
        kind: What messages call it.
        config: The vision config.
        family: The tower's architecture.
        preprocessor: How images are prepared; None if the checkpoint does not say.
        tensors: The tower's tensors; None for a rehearsal.
        root: What the names of the tower's tensors begin with.
        model: The config of the model around the tower, to which a projector belongs; None if there is no model.
        around: Finds all tensors of the model, among them the head's; None for a rehearsal.
        head_root: What the names of the head's tensors begin with in another library; "" if that is the head's own.
        translate_head: Turns the head's tensors of another library into transformers'.
        translate: Turns tensors of another library into transformers'.
        said_as: The field of config.json that holds the model's layer; None if the model does not read one.
        select_layer: The config's layer; None if it does not say.
        select_feature: The config's choice of tokens; None if it does not say.
        drops_first: The setting that makes eager code drop a tower's first token, if there is one.
        not_pooled: Why its tokens are not pooled as an embedding here is; None if they are.
        contrastive: Whether the model reads one pooled vector per image and no hidden state.
        image_size: S at which the model uses its tower, in pixels a side; None if it is that of the vision config.
        cameras: How many images a robot policy reads at a time; None for another model, or if its config does not say.
        image_aspect_ratio: The config's word for how pictures are padded or tiled before they are prepared.
        remarks: What an export tells the user.
    """

    kind: str
    config: Any
    family: Family
    preprocessor: dict[str, Any] | None
    tensors: Tensors | None = None
    root: str = ""
    model: Any = None
    around: Callable[[], Tensors] | None = None
    head_root: str = ""
    translate_head: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    said_as: str | None = None
    select_layer: LayerCode | None = None
    select_feature: str | None = None
    drops_first: str | None = None
    not_pooled: str | None = None
    contrastive: bool = False
    image_size: int | None = None
    cameras: int | None = None
    image_aspect_ratio: str | None = None
    remarks: tuple[str, ...] = ()


def with_tower(
    layout: Layout, tensors: Tensors, patch_embedding: str, request: Request, *, larger: bool
) -> Layout | None:
    """Return the layout with the tower's tensors, picked from the whole checkpoint's; None if it has no such tower.

    ``larger`` says whether the checkpoint holds more than its tower. Raises CheckpointError if there are several towers
    to choose from or none of the requested name, if an adapter or a wrapper may have changed this one, or if a file is
    missing, incomplete, or a pickle that is not allowed.
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
        remarks += (f"removed {', '.join(wrappers)} from the names of the tower's tensors: they only wrap modules",)
    return replace(layout, tensors=tower, root=root, around=lambda: tensors, remarks=(*layout.remarks, *remarks))


def inside_model(layout: Layout, files: Files, others: Collection[str]) -> Layout:
    """Add remarks on the adapters of the model around a tower that lies in a separate folder.

    ``others`` are the names of the model's own tensors. Raises CheckpointError if an adapter may belong to the tower.
    """
    if layout.tensors is None:
        return layout
    remarks = adapters.check_adapter(files, layout.tensors, others, larger=True)
    return replace(layout, remarks=(*layout.remarks, *remarks))


def read_preprocessor(files: Files) -> dict[str, Any] | None:
    """Read how images are prepared, from the file that transformers 4 or 5 writes."""
    written = files.read_json("preprocessor_config.json")
    if written is None:
        written = (files.read_json("processor_config.json") or {}).get("image_processor")
    if written is not None and not isinstance(written, dict):
        raise CheckpointError(f"{files.folder}/processor_config.json: image_processor={written!r} is not an object.")
    return written


def no_tower(tensors: Tensors, expected: str) -> CheckpointError:
    """Build the error for a checkpoint without a tower; ``expected`` says what it should hold."""
    folder, why = tensors.files.folder, ""
    if (wrapped := next(filter(unknown_wrapper, tensors.shards), None)) is not None:
        why = (
            f" Some of its tensors, such as {wrapped}, are inside an unknown wrapper: save the wrapped model with "
            "save_pretrained(), and export that."
        )
    elif not tensors.shards and (unfinished := unfinished_in(folder)):
        why = f" The download of {unfinished} was interrupted: download it again."
    elif not tensors.shards and (inner := checkpoints_in(folder)):
        why = f" Did you mean one of the folders inside it: {', '.join(map(str, inner[:5]))}?"
    elif not tensors.shards and tensors.files.repo and not tensors.allow_pickle:
        why = (
            f" Only safetensors were downloaded. If {tensors.files.repo} has its weights in {PICKLE}, pass "
            "--allow-pickle if you trust its author."
        )
    return CheckpointError(f"{folder} holds no weights of {expected}.{why}")
