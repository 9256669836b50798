"""Say what is wrong with the path of a bundle: it is no path, or something else is there."""

from difflib import get_close_matches
from glob import escape
from pathlib import Path

from trtower.bundle.manifest import CONFIG, GRAPH, MANIFEST
from trtower.errors import ConfigError
from trtower.names import CLOSE


def read_folder(path: object, name: str) -> Path:
    """Return ``path`` as a Path, with ~ expanded; raise ConfigError naming the option ``name`` if it is not a path."""
    try:
        folder = Path(path).expanduser()  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as err:  # not a path, or the home of an unknown user
        value = f"{path!r}" if isinstance(path, str) else f"of type {type(path).__name__}"
        raise ConfigError(f"{name} is {value}; expected the path of a folder.") from err
    if path == "":  # or it would be the current folder
        raise ConfigError(f"{name} is ''; expected the path of a folder.")
    if "\0" in str(folder):
        raise ConfigError(f"{name} is {str(folder)!r}; expected the path of a folder, without NUL characters.")
    return folder


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
    if nearest := _nearest_bundle(folder):
        advice = f"There is {nearest}."
    # Looks like a checkpoint on the hub, such as openai/clip-vit-base-patch32, and not like a missing bundle.
    elif len(folder.parts) == 2 and not folder.parent.exists() and folder.parts[0] != "engines":
        advice = f"`trtower export {folder}` makes one from that checkpoint on the hub."
    else:
        advice = "`trtower export CHECKPOINT` makes one."
    where = "" if folder.is_absolute() else f" in {Path.cwd()}"
    return f"it does not exist{where}. {advice}"


def _nearest_bundle(folder: Path) -> Path | None:
    """Return the bundle beside ``folder`` that was probably meant, or one of the same name one folder further down."""
    beside = {each.parent.name: each.parent for each in sorted(folder.parent.glob(f"[!.]*/{MANIFEST}"))}
    longer = [name for name in beside if name.startswith(f"{folder.name}.")]
    if names := longer or get_close_matches(folder.name, beside, n=1, cutoff=CLOSE):
        return beside[names[0]]
    below = sorted(folder.parent.glob(f"[!.]*/{escape(folder.name)}/{MANIFEST}"))  # as in engines/NAME
    return below[0].parent if below else None
