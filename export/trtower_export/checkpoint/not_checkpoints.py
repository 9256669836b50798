"""Say what a path is that is not a checkpoint, and what to export instead: bundles, single files, outer folders.

What is cheap to tell by content is told by content, and by the suffix otherwise.
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
"""Folders to name at most."""

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
    (f"a program of torch.export: {_EXPORT_PYTORCH}", (), (".pt2",)),
    (ARCHIVE, (b"\x1f\x8b", b"7z\xbc\xaf", b"\xfd7zXZ", b"(\xb5/\xfd"), ()),
)
"""What a file is and what to do, by how its content begins and by its suffix."""
_SUFFIXES = {suffix: what for what, _, suffixes in _FORMATS for suffix in suffixes}
_OTHER_FOLDERS = {"model_index.json": "a pipeline of diffusers", "modules.json": "a model of sentence-transformers"}
"""What folders are that have such a file and no config.json."""
_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
DEEP = 3
"""How many folders down a checkpoint is looked for: a hub's cache has snapshots/REVISION/."""


def refuse_file(path: Path, config: str) -> None:
    """Raise CheckpointError for a file that is not of weights, or that has no ``config`` beside it to read it by."""
    check_arrived(path)
    what = _what(path)
    if what is not None and what != WEIGHTS:
        raise CheckpointError(f"{path} is {what}.")
    if path.name.startswith("adapter_"):
        raise CheckpointError(f"{path} is part of an adapter: export {path.parent}, once the adapter was merged.")
    if (path.parent / config).is_file() and what == WEIGHTS:
        return
    if (path.parent / "config.json").is_file():
        raise CheckpointError(f"{path} is one file of a checkpoint: export the folder that holds it, {path.parent}.")
    if what is None:
        raise CheckpointError(
            f"{path} is not a checkpoint: a folder with a config.json, an OpenCLIP file, a hub id or a recipe is "
            "expected."
        )
    raise CheckpointError(
        f"{path} has no {config} beside it, and no config.json: the heads and activation of an OpenCLIP tower, "
        "and the shape of any other, are written nowhere else. The checkpoint's repository has it."
    )


def _what(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(16)
    if found := next((what for what, magic, _ in _FORMATS if head.startswith(magic)), None):
        return found
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
    """Raise CheckpointError if a folder is a bundle, which has a config.json as a checkpoint does."""
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
    other = next((f"{kind}, and " for name, kind in _OTHER_FOLDERS.items() if (folder / name).is_file()), "")
    raise CheckpointError(f"{folder} is {other}no checkpoint: {lack}{_next_step(folder)}.")


def _next_step(folder: Path) -> str:
    if inner := checkpoints_in(folder):
        return f". Export {' or '.join(map(str, inner[:MANY]))}{', …' if len(inner) > MANY else ''}, which has one"
    if not any(folder.iterdir()):
        return ", the folder is empty"
    if unfinished := unfinished_in(folder):
        return f", and the download of {unfinished} was interrupted: download the checkpoint again"
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES:
            return f", and {path.name} is {_SUFFIXES[path.suffix]}"
        if path.suffix in _OF_WEIGHTS:
            return f", which says what {path.name} is. The checkpoint's repository has it"
        if path.name.startswith("tokenizer"):
            return ", and only a tokenizer"
    return ". A Hugging Face, LLaVA or VILA folder has one"


def checkpoints_in(folder: Path) -> list[Path]:
    """List the folders inside that have a config.json: those with a vision tower if there are any, else all.

    A bundle has one, too, and is left out.
    """
    configs = (path for depth in range(1, DEEP + 1) for path in folder.glob("*/" * depth + "config.json"))
    found = sorted({path.parent for path in configs if not (path.parent / MANIFEST).is_file()})
    return [path for path in found if _has_tower(path)] or found


def _has_tower(folder: Path) -> bool:
    try:
        written = Files(folder=folder).read_json("config.json") or {}
    except CheckpointError:
        return False
    return "vision_config" in written or "mm_vision_tower" in written or is_exported(written.get("model_type"))


def unfinished_in(folder: Path) -> str | None:
    """Name a file in a folder whose download did not end."""
    places = ("*", "*/*", ".cache/huggingface/download/*")
    found = (path for place in places for path in sorted(folder.glob(place)) if path.suffix in UNFINISHED)
    return next((str(path.relative_to(folder)) for path in found), None)
