"""Remove what wrappers add to the names of a checkpoint's tensors: torch.compile, FSDP, activation checkpointing, DDP.

A state dict saved from a wrapped model has the wrapper in each tensor's name. These wrappers change no numbers, so the
names without them are the model's own. An unknown wrapper might change them, so it is refused.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from trtower.errors import CheckpointError

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that hold one other module and nothing else. They may stand anywhere in a name."""

OUTERMOST = "module"
"""What DistributedDataParallel and DeepSpeed call the whole model. It stands only at the beginning of a name."""


def unwrap(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Map each name without its wrappers to the name as written; raise CheckpointError if two become equal."""
    written: dict[str, str] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in WRAPPERS] or [name]
        if parts[0] == OUTERMOST and len(parts) > 1:
            parts = parts[1:]
        other = written.setdefault(".".join(parts), name)
        if other != name:
            raise CheckpointError(
                f"{folder} holds {other} and {name}, which have the same name once wrappers are removed: leave one of "
                "them out of a copy."
            )
    return written


def wrappers_in(written: Mapping[str, str]) -> list[str]:
    """List the wrappers that were removed from these names."""
    parts = {part for name, raw in written.items() if name != raw for part in raw.split(".")}
    return sorted(parts.intersection((*WRAPPERS, OUTERMOST)))


def unknown_wrapper(name: str) -> str | None:
    """Find a part of a name that no transformers model has: one that begins with _, or `module` inside the name."""
    return next((part for part in name.split(".") if part.startswith("_") or part == OUTERMOST), None)


def refuse_unknown_wrapper(names: Iterable[str], root: str, folder: Path) -> None:
    """Raise CheckpointError if a name has an unknown wrapper after ``root``."""
    for name in names:
        if part := unknown_wrapper(name.removeprefix(root)):
            raise CheckpointError(
                f"{folder} holds {name}: unknown wrapper {part!r}; expected {', '.join(WRAPPERS)} or a leading "
                f"{OUTERMOST}. Save the wrapped model with save_pretrained(), and export that."
            )
