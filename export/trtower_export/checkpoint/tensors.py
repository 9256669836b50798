"""Find a tower's tensors in a checkpoint of any size, and read only those.

A LLaVA checkpoint holds tens of gigabytes of language model around half a gigabyte of tower. The shards' index or
headers give the names before any tensor is read, and the name of the patch embedding shows which of them are the
tower's. From the hub, only the shards that hold the tower are downloaded.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trtower.errors import CheckpointError
from trtower_export.checkpoint.files import Files, check_arrived, first_line
from trtower_export.checkpoint.wrapped_names import unwrap

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
PICKLES = "pytorch_model*.bin"
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which a training checkpoint keeps the model's state dict."""
NOT_THE_MODELS = ("adapter_model", "open_clip_")
"""Beginnings of the names of other files: those of an adapter, or of the same model under OpenCLIP's names."""
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The names of a checkpoint's tensors. No tensor is read yet.

    ``shards`` maps each name to the file that holds it, and ``written`` to the name in that file, which may contain
    wrappers (see wrapped_names.py).
    """

    files: Files
    shards: Mapping[str, str]
    written: Mapping[str, str]
    allow_pickle: bool = False

    @classmethod
    def of(cls, files: Files, shards: Mapping[str, str], *, allow_pickle: bool) -> "Tensors":
        """Remove the wrappers from the names in ``shards``, which maps each to its file."""
        written = unwrap(shards, files.folder)
        unwrapped = {name: shards[raw] for name, raw in written.items()}
        return cls(files=files, shards=unwrapped, written=written, allow_pickle=allow_pickle)

    def inside(self, module: str) -> "Tensors":
        """Return the same tensors under the names that they have inside a module of the model."""
        shards = {f"{module}.{name}": shard for name, shard in self.shards.items()}
        return replace(self, shards=shards, written={f"{module}.{name}": raw for name, raw in self.written.items()})

    def roots(self, patch_embedding: str) -> list[str]:
        """List what the names of each tower begin with."""
        return sorted(
            name.removesuffix(patch_embedding)
            for name in self.shards
            if name == patch_embedding or name.endswith(f".{patch_embedding}")
        )

    def root(self, patch_embedding: str, tower: str | None = None) -> str | None:
        """Find what the names of a tower's tensors begin with: the only tower, or the one named ``tower``.

        Returns None if there is no tower. Raises CheckpointError if there are several to choose from, or none with this
        name.
        """
        roots = self.roots(patch_embedding)
        if tower is not None and roots:
            roots = self._named(tower, roots)
        if len(roots) > 1:
            names = " and ".join(f"{root}{patch_embedding}" for root in roots)
            choices = " or ".join(f"--tower {root.rstrip('.')}" for root in roots if root)
            raise CheckpointError(f"{self.files.folder} holds {len(roots)} towers: {names}. Choose one with {choices}.")
        return roots[0] if roots else None

    def _named(self, tower: str, roots: list[str]) -> list[str]:
        """Return the roots that ``tower`` names in full, or else those that it names in part."""
        name = tower.strip(".")
        if exact := [root for root in roots if root.rstrip(".") == name]:
            return exact
        # In a loaded model a tower may lie one level deeper: `model.image_tower` is `image_tower` in the file.
        for part in (name, name.removeprefix("model.")):
            if partial := [root for root in roots if f".{part}." in f".{root}"]:
                return partial
        known = " and ".join(root.rstrip(".") for root in roots if root)
        raise CheckpointError(
            f"{self.files.folder} has no tower {tower!r}; it has {known}."
            if known
            else f"{self.files.folder} is a single tower and nothing else: leave out --tower {tower}."
        )

    def select(self, root: str) -> "Tensors":
        """Keep only the tensors under ``root``; fetch the shards that hold them, and check that they are complete."""
        shards = {name: shard for name, shard in self.shards.items() if name.startswith(root)}
        needed = sorted(set(shards.values()))
        if not self.allow_pickle and not needed[0].endswith(".safetensors"):
            raise _pickle_refused(self.files.folder, needed[0])
        self.files.fetch(*needed)
        for shard in needed:
            path = self.files.folder / shard
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing: the index says that it holds tensors of the tower. Download it again."
                )
            held = names_in(path)
            absent = sorted(name for name, where in shards.items() if where == shard and self.written[name] not in held)
            if absent:
                raise CheckpointError(
                    f"{path} does not hold {absent[0]}, although the index says so: download both again."
                )
        return replace(self, shards=shards, written={name: self.written[name] for name in shards})

    def read(self) -> dict[str, Tensor]:
        """Read these tensors with the dtype in the file, except `position_ids`, which the model computes.

        Files are mapped, not copied, except pickles from before PyTorch 1.6. Raises CheckpointError if a tensor is
        quantised, because its numbers are not the weights, or if a file cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(self.shards.values())):
            names = {name: self.written[name] for name, where in self.shards.items() if where == shard}
            tensors |= _read(self.files.folder / shard, names)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
        for name, tensor in tensors.items():
            if tensor.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"{self.files.folder}: {name} is {tensor.dtype}, so this tower is quantised: export the checkpoint "
                    "that it was quantised from."
                )
        return tensors


def find_tensors(files: Files, *, allow_pickle: bool) -> Tensors:
    """List the tensors of a folder, possibly none.

    The index of pickled shards is JSON and is always read; the pickles themselves only if they are allowed. Raises
    CheckpointError if a folder on this machine has the tensors only in pickles that are not allowed and have no index;
    if they have one, `Tensors.select` raises. From the hub, pickles that are not allowed are not fetched.
    """
    files.fetch(SAFETENSORS)
    whole, pickled = files.folder / SAFETENSORS, files.folder / PICKLE
    if whole.is_file():
        return list_tensors(files, [whole], allow_pickle=allow_pickle)
    for index in (f"{SAFETENSORS}.index.json", f"{PICKLE}.index.json"):
        data = files.read_json(index)
        if data is not None:
            return Tensors.of(files, _shards(files.folder / index, data), allow_pickle=allow_pickle)
    files.fetch("*.safetensors", *([PICKLES] if allow_pickle else []))
    paths = [path for path in sorted(files.folder.glob("*.safetensors")) if not path.name.startswith(NOT_THE_MODELS)]
    if not paths:
        paths = [pickled] if pickled.is_file() else sorted(files.folder.glob(PICKLES))
    return list_tensors(files, paths, allow_pickle=allow_pickle)


def list_tensors(files: Files, paths: Sequence[Path], *, allow_pickle: bool) -> Tensors:
    """List the tensors of these files, which lie in the folder of ``files``."""
    shards: dict[str, str] = {}
    for path in paths:
        if path.suffix != ".safetensors" and not allow_pickle:
            raise _pickle_refused(files.folder, path.name)
        for name in names_in(path):
            if name in shards:
                raise CheckpointError(
                    f"{path} and {shards[name]} beside it both hold {name}, and no index says which to use: delete the "
                    "wrong one from a copy of the folder."
                )
            shards[name] = path.name
    return Tensors.of(files, shards, allow_pickle=allow_pickle)


def _shards(path: Path, index: dict[str, object]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; expected one that names the shard of every tensor.")
    suffix = ".bin" if path.name.startswith(PICKLE) else ".safetensors"
    for shard in sorted(set(map(str, weight_map.values()))):
        if not shard.endswith(suffix) or Path(shard).name != shard:
            raise CheckpointError(f"{path} names {shard!r} as a shard: only {suffix} files beside it are read.")
    return {str(name): str(shard) for name, shard in weight_map.items()}


def names_in(path: Path) -> set[str]:
    """List the names in a file, as they are written there; raise CheckpointError if the file is not whole."""
    check_arrived(path)
    if path.suffix != ".safetensors":
        return set(_unpickle(path))
    with _reading(path), safe_open(path, framework="pt") as tensors:
        return set(tensors.keys())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as err:
        if "Unsupported global" in str(err):  # of PyTorch's own unpickler
            raise CheckpointError(
                f"{path} holds more than tensors, such as a whole pickled model, and is not read. Load it where you "
                "trust it, and save its state_dict(), best as safetensors."
            ) from err
        raise CheckpointError(f"{path} could not be read; it may be cut short: {first_line(err)}.") from err


def _read(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        tensors = _unpickle(path)
        return {name: tensors[written] for name, written in names.items()}
    with _reading(path), safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(written) for name, written in names.items()}


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Map a pickled state dict with PyTorch's own unpickler, which builds tensors and nothing else."""
    with _reading(path):
        # Files from before PyTorch 1.6 are not zip archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    tensors = loaded
    if isinstance(loaded, dict):
        tensors = next((loaded[key] for key in STATE_DICTS if isinstance(loaded.get(key), dict)), loaded)
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a state dict.")
    return {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _pickle_refused(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds its weights only as a pickle ({name}), which may run code when it is loaded. "
        "Convert it to safetensors, or pass --allow-pickle if you trust its author."
    )
