"""Say what is at a path that is not a bundle, and what to do about it."""

from difflib import get_close_matches
from pathlib import Path

from trtower.bundle.manifest import CONFIG, GRAPH, MANIFEST
from trtower.names import CLOSE


def describe_instead(folder: Path) -> str:
    """Say what is at a path that is not a bundle, and where a bundle is or how to make one."""
    if folder.is_file():
        is_part = (folder.parent / MANIFEST).is_file()
        return f"it is a file{f' in the bundle {folder.parent}.' if is_part else ', not a folder.'}"
    if folder.exists():
        inside = [each.parent.name for each in sorted(folder.glob(f"[!.]*/{MANIFEST}"))]
        nearby = f", but contains the bundle{'s' if inside[1:] else ''} {', '.join(inside)}" if inside else ""
        if (folder / GRAPH).is_file():
            return f"it has a {GRAPH}, but no {MANIFEST}. Copy the bundle again."
        checkpoint, source = (folder, " from it") if (folder / CONFIG).is_file() else ("CHECKPOINT", "")
        return f"it has no {MANIFEST}{nearby}. `trtower export {checkpoint}` makes a bundle{source}."
    bundles = {each.parent.name: each.parent for each in sorted(folder.parent.glob(f"[!.]*/{MANIFEST}"))}
    beside = [name for name in bundles if name.startswith(f"{folder.name}.")]
    beside = beside or get_close_matches(folder.name, bundles, n=1, cutoff=CLOSE)
    advice = "`trtower export CHECKPOINT` makes one."
    # Looks like a checkpoint on the hub, such as openai/clip-vit-base-patch32, and not like a missing bundle.
    if len(folder.parts) == 2 and not folder.parent.exists() and folder.parts[0] != "engines":
        advice = f"`trtower export {folder}` makes one from that checkpoint on the hub."
    where = "" if folder.is_absolute() else f" in {Path.cwd()}"
    return f"it does not exist{where}. {f'There is {bundles[beside[0]]}.' if beside else advice}"
