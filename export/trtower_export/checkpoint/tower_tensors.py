"""Put the tower's tensors into a layout, once it is certain that they are the tower that people run.

Adapters that were not merged and wrappers that are not known would make another tower of the same names.
"""

from collections.abc import Collection
from dataclasses import replace

from trtower.errors import CheckpointError
from trtower_export.checkpoint import adapters
from trtower_export.checkpoint.files import Files
from trtower_export.checkpoint.layout import Layout, Request
from trtower_export.checkpoint.not_checkpoints import checkpoints_in, unfinished_in
from trtower_export.checkpoint.tensors import Tensors
from trtower_export.checkpoint.wrapped_names import refuse_unknown_wrapper, unknown_wrapper, wrappers_in


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
    others = tensors.shards.keys() - tower.shards.keys()
    remarks += say_adapter(files, tower, others, request, larger=larger)
    if wrappers := wrappers_in(tower.written):
        remarks += (f"removed from the names of the tower's tensors: {', '.join(wrappers)}, which only wrap modules",)
    return replace(layout, tensors=tower, root=root, remarks=(*layout.remarks, *remarks))


def say_adapter(
    files: Files, tower: Tensors, others: Collection[str], request: Request, *, larger: bool
) -> tuple[str, ...]:
    """Return what to say of the adapters in a folder; raise CheckpointError if one may be of ``tower``."""
    allow_pickle = request.trust.allow_pickle
    return adapters.check_adapter(files, tower.shards, others, larger=larger, allow_pickle=allow_pickle)


def no_tower(tensors: Tensors, expected: str) -> CheckpointError:
    """Make the error for a checkpoint without a tower; ``expected`` says what there should be."""
    folder = tensors.files.folder
    message = f"{folder} holds no weights of {expected}"
    if (wrapped := next(filter(unknown_wrapper, tensors.shards), None)) is not None:
        return CheckpointError(
            f"{message}. Some of its tensors are inside a wrapper that is not known here, {wrapped} among them: "
            "save the model that it wraps with save_pretrained(), and export that."
        )
    if tensors.shards:
        return CheckpointError(f"{message}.")
    if unfinished := unfinished_in(folder):
        return CheckpointError(f"{message}. The download of {unfinished} was interrupted: download it again.")
    if inner := checkpoints_in(folder):
        return CheckpointError(f"{message}. Is it one of the folders inside: {', '.join(map(str, inner[:5]))}?")
    return CheckpointError(f"{message}.")
