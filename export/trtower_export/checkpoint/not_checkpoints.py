"""Refuse what is not a checkpoint (bundles, single files, outer folders), and say what to export instead.

A file is recognised by its content if that is cheap, else by its suffix.
"""

import tarfile
import zipfile
from pathlib import Path
from typing import NoReturn

from trtower.bundle.manifest import MANIFEST
from trtower.errors import CheckpointError
from trtower_export.checkpoint.files import Files, check_arrived
from trtower_export.families import is_exported

WEIGHTS = "a file of weights"
UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")
MANY = 5
"""How many folders a message names at most."""

_CONVERTED = "export the checkpoint that it was converted from"
_EXPORT_PYTORCH = "export the PyTorch checkpoint that it was made from"
ARCHIVE = "an archive: unpack it, and export the folder"
_FORMATS: tuple[tuple[str, tuple[bytes, ...], tuple[str, ...]], ...] = (
    (f"a GGUF file of llama.cpp: {_CONVERTED}", (b"GGUF",), (".gguf",)),
    (f"a GGML file of llama.cpp: {_CONVERTED}", (b"ggml",), ()),
    (f"a TensorRT engine: {_EXPORT_PYTORCH}", (b"ftrt", b"ptrt"), (".engine", ".plan", ".trt")),
    (f"an ONNX graph: {_EXPORT_PYTORCH}", (), (".onnx",)),
    (f"a TensorFlow Lite model: {_EXPORT_PYTORCH}", (), (".tflite",)),
    (f"a Keras file: {_EXPORT_PYTORCH}", (b"\x89HDF",), (".h5",)),
    (f"Flax weights: {_EXPORT_PYTORCH}", (), (".msgpack",)),
    (f"a torch.export program: {_EXPORT_PYTORCH}", (), (".pt2",)),
    (ARCHIVE, (b"\x1f\x8b", b"7z\xbc\xaf", b"\xfd7zXZ", b"(\xb5/\xfd"), ()),
)
"""For each format: what it is and what to do, how its content begins, and its suffixes."""
_SUFFIXES = {suffix: what for what, _, suffixes in _FORMATS for suffix in suffixes}
_OTHER_FOLDERS = {"model_index.json": "a diffusers pipeline", "modules.json": "a sentence-transformers model"}
"""For each file: what a folder is if it has this file but no config.json."""
_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
DEEP = 3
"""How many folders deep to look for a checkpoint: a hub's cache has snapshots/REVISION/."""


def refuse_file(path: Path, config: str) -> None:
    """Raise CheckpointError for a file that does not hold weights, or has no ``config`` beside it to describe them."""
    check_arrived(path)
    what = _recognise(path)
    if what is not None and what != WEIGHTS:
        raise CheckpointError(f"{path} is {what}.")
    if path.name.startswith("adapter_"):
        raise CheckpointError(f"{path} is part of an adapter: export {path.parent} once the adapter is merged.")
    if (path.parent / config).is_file() and what == WEIGHTS:
        return
    if (path.parent / "config.json").is_file():
        raise CheckpointError(f"{path} is one file of a checkpoint: export the folder that holds it, {path.parent}.")
    if what is None:
        raise CheckpointError(
            f"{path} is not a checkpoint: expected a folder with a config.json, an OpenCLIP file, a hub id or a recipe."
        )
    raise CheckpointError(
        f"{path} has no {config} beside it, and no config.json. The weights do not say how many heads a tower has, or "
        "which activation: get the config from the checkpoint's repository."
    )


def _recognise(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(16)
    if what := next((what for what, magic, _ in _FORMATS if head.startswith(magic)), None):
        return what
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
            return f"a TorchScript program: {_EXPORT_PYTORCH}"
        return WEIGHTS if any(name.endswith("data.pkl") for name in names) else ARCHIVE
    if head[8:9] == b"{" or head.startswith(_PICKLES):
        return WEIGHTS
    if tarfile.is_tarfile(path):
        return ARCHIVE
    return WEIGHTS if path.suffix in _OF_WEIGHTS else None


def refuse_bundle(files: Files) -> None:
    """Raise CheckpointError if a folder is a bundle, which has a config.json just like a checkpoint."""
    written = files.read_json(MANIFEST) or {}
    if "schema" not in written or not isinstance(written.get("source"), dict):
        return
    raise CheckpointError(
        f"{files.folder} is a bundle, which trtower exported from {written['source'].get('checkpoint')}: export that "
        "checkpoint again, or serve, build or check the bundle as it is."
    )


def refuse_folder(files: Files, lack: str = "it has no config.json") -> NoReturn:
    """Raise CheckpointError for a folder without a model's config.json, naming what in it could be exported."""
    folder = files.folder
    other = next((f" but {kind}" for name, kind in _OTHER_FOLDERS.items() if (folder / name).is_file()), "")
    raise CheckpointError(f"{folder} is not a checkpoint{other}: {lack}{_next_step(folder)}.")


def _next_step(folder: Path) -> str:
    if inner := checkpoints_in(folder):
        return f". Export {' or '.join(map(str, inner[:MANY]))}{', …' if len(inner) > MANY else ''}, which has one"
    if not any(folder.iterdir()):
        return "; the folder is empty"
    if unfinished := unfinished_in(folder):
        return f"; the download of {unfinished} was interrupted, so download the checkpoint again"
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES:
            return f"; {path.name} is {_SUFFIXES[path.suffix]}"
        if path.suffix in _OF_WEIGHTS:
            return f" to describe {path.name}. Get it from the checkpoint's repository"
        if path.name.startswith("tokenizer"):
            return ", only a tokenizer"
    return ". A Hugging Face, LLaVA or VILA folder has one"


def checkpoints_in(folder: Path) -> list[Path]:
    """List the inner folders that have a config.json: only those with a vision tower, or all if none has one.

    Bundles are left out, although they have one, too.
    """
    configs = (path for depth in range(1, DEEP + 1) for path in folder.glob("*/" * depth + "config.json"))
    folders = sorted({path.parent for path in configs if not (path.parent / MANIFEST).is_file()})
    return [path for path in folders if _has_tower(path)] or folders


def _has_tower(folder: Path) -> bool:
    try:
        written = Files(folder=folder).read_json("config.json") or {}
    except CheckpointError:
        return False
    return "vision_config" in written or "mm_vision_tower" in written or is_exported(written.get("model_type"))


def unfinished_in(folder: Path) -> str | None:
    """Find a file in a folder whose download did not finish."""
    places = ("*", "*/*", ".cache/huggingface/download/*")
    unfinished = (path for place in places for path in sorted(folder.glob(place)) if path.suffix in UNFINISHED)
    return next((str(path.relative_to(folder)) for path in unfinished), None)
