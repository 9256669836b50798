"""Recognise what a checkpoint is from its files: where its tower's config and tensors lie, and which layer it reads.

People hold a tower in four ways: as Hugging Face writes it, alone or inside a larger model; inside an original
LLaVA checkpoint, or in the tower that this names; in a folder of its own inside a VILA checkpoint; as an OpenCLIP
file. Only JSON is read here, and no code of the checkpoint is run unless it is trusted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from trtower.errors import CheckpointError
from trtower.layer_codes import LayerCode
from trtower.reading import is_contrastive, read_vision_feature_layer
from trtower_export import open_clip
from trtower_export.families import Family, family_of
from trtower_export.families.base import square
from trtower_export.files import Files, download, first_line, one_line
from trtower_export.recipes import Recipe, find_recipe
from trtower_export.vision_config import check_vision_config, read_vision_config
from trtower_export.weights import Tensors, find_tensors, list_tensors

VILA_TOWER = "vision_tower"

HF_FEATURES = {"default": "patch", "full": "cls_patch"}
"""transformers' `vision_feature_select_strategy`, in LLaVA's words."""

TRAINED = (
    "unfreeze_mm_vision_tower",
    "unfreeze_vision_tower",
    "tune_vision_tower",
    "mm_vision_tower_lr",
    "vision_tower_lr",
)
"""Keys with which LLaVA and its forks say that the tower they name is not the tower they were trained with."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a checkpoint may do that could run its author's code. Both are off unless the user asks."""

    allow_pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was recognised. ``tensors`` are the tower's, their names beginning with ``root``; None for a rehearsal.

    ``select_layer`` and ``select_feature`` are what the config says, None where it says nothing; a model that reads
    a layer of its own choosing and does not say which has ``unsaid``. ``said_as`` is the field of config.json that
    names the layer, and ``drops_first`` the setting with which eager code drops a tower's first token.
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


def from_recipe(recipe: Recipe) -> Layout:
    """Describe a rehearsal from what is known of a well-known checkpoint."""
    config = transformers.AutoConfig.for_model(**recipe.config)
    return Layout(kind="recipe", config=config, family=family_of(config.model_type), preprocessor=recipe.preprocessor)


def recognise(files: Files, trust: Trust, *, weights: bool) -> Layout:
    """Tell what lies in ``files``; with ``weights``, also where its tensors are, and have them here.

    Raises CheckpointError naming the file or field that is wrong.
    """
    raw = files.read_json("config.json")
    # timm's repositories have a config.json of their own beside OpenCLIP's, which names no model type.
    foreign = raw is None or not (raw.get("model_type") or _is_llava(raw))
    if foreign and files.read_json(open_clip.CONFIG) is not None:
        return _open_clip(files, None, trust, weights=weights)
    if raw is None:
        raise CheckpointError(
            f"{files.folder} is no checkpoint: it has no config.json. A Hugging Face, LLaVA or VILA folder has one."
        )
    inner = "vision_config" not in raw and (files.folder / VILA_TOWER / "config.json").is_file()
    if "vision_tower_cfg" in raw or inner:
        return _vila(files, raw, trust, weights=weights)
    if _is_llava(raw):
        return _original_llava(files, raw, trust, weights=weights)
    return _hugging_face(files, raw, trust, weights=weights)


def recognise_file(path: Path, trust: Trust, *, weights: bool) -> Layout:
    """Tell what a single file of weights is: an OpenCLIP ViT, if the config that belongs to it lies beside it."""
    return _open_clip(Files(folder=path.parent), path, trust, weights=weights)


_LLAVA_KEYS = {"mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size", "mm_projector_type"}


def _is_llava(raw: dict[str, Any]) -> bool:
    said = bool(_LLAVA_KEYS & raw.keys()) or str(raw.get("model_type")).startswith("llava")
    return said and "vision_config" not in raw


def _original_llava(files: Files, raw: dict[str, Any], trust: Trust, *, weights: bool) -> Layout:
    """Read LLaVA's own checkpoint. Its tower lies in its shards, or else only in the tower that it names."""
    named = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not isinstance(named, str):
        raise CheckpointError(
            f"{files.folder}/config.json is a LLaVA config without a tower: mm_vision_tower is {named!r}; "
            "a hub id or a folder is expected."
        )
    if named.startswith("open_clip_hub:"):
        raise CheckpointError(
            f"{files.folder}/config.json names mm_vision_tower {named!r}: LLaVA-NeXT counts OpenCLIP's layers without "
            "the embeddings. Export the OpenCLIP file itself, with --select-layer one higher where it is not negative."
        )
    if (files.folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{files.folder} is a LoRA adapter: merge it into its base model, and export that.")
    layout = _named_tower(files, named, trust, weights=False)
    if weights:
        tensors = find_tensors(files, allow_pickle=trust.allow_pickle)
        root = tensors.root(layout.family.patch_embedding)
        if root is not None:
            layout = replace(layout, tensors=tensors.select(root), root=root)
        elif trained := _says_trained(raw):
            raise CheckpointError(
                f"{files.folder}/config.json says that its tower was trained ({trained}), but the checkpoint holds no "
                f"{layout.family.name} tower: {named} would have other weights."
            )
        else:
            layout = _named_tower(files, named, trust, weights=True)
    return replace(
        layout,
        kind="LLaVA checkpoint",
        preprocessor=layout.preprocessor or _read_preprocessor(files),  # LLaVA takes that of the tower it names
        select_layer=raw.get("mm_vision_select_layer"),
        select_feature=raw.get("mm_vision_select_feature"),
        said_as="mm_vision_select_layer",
        unsaid=raw.get("mm_vision_select_layer") is None,
        drops_first=None,
    )


def _says_trained(raw: dict[str, Any]) -> str | None:
    """Find the key that says that the tower was trained."""
    if "mm_vision_tower" in str(raw.get("mm_tunable_parts")):
        return "mm_tunable_parts"
    return next((key for key in TRAINED if raw.get(key)), None)


def _named_tower(files: Files, named: str, trust: Trust, *, weights: bool) -> Layout:
    """Open the tower that a LLaVA config names; what is known of it as a recipe needs no hub."""
    folder, recipe = Path(named).expanduser(), find_recipe(named)
    try:
        if recipe and not weights and not folder.is_dir():
            return from_recipe(recipe)
        tower = Files(folder=folder) if folder.is_dir() else download(named, None)
        return _recognise_tower(tower, trust, weights=weights)
    except (CheckpointError, OSError) as err:
        raise CheckpointError(
            f"{files.folder}/config.json names mm_vision_tower {named!r}: {first_line(err)}. Edit mm_vision_tower "
            "where the tower is elsewhere now."
        ) from err


def _recognise_tower(files: Files, trust: Trust, *, weights: bool) -> Layout:
    """Tell what lies in a folder that must be a tower; one LLaVA checkpoint that names another could name itself."""
    if _is_llava(files.read_json("config.json") or {}):
        raise CheckpointError(f"{files.folder} is a LLaVA checkpoint itself, and no tower")
    return recognise(files, trust, weights=weights)


def _vila(files: Files, raw: dict[str, Any], trust: Trust, *, weights: bool) -> Layout:
    """Read the tower's own folder in a VILA or NVILA checkpoint; its position embeddings are resized already."""
    tower = files.inner(VILA_TOWER)
    config = tower.read_json("config.json")
    if config is None:
        raise CheckpointError(
            f"{tower.folder}/config.json is missing: {files.folder}/config.json is VILA's, and its tower lies there."
        )
    layer, feature = raw.get("mm_vision_select_layer"), raw.get("mm_vision_select_feature")
    return replace(
        _hugging_face(tower, config, trust, weights=weights),
        kind="VILA checkpoint",
        select_layer=-2 if layer is None else layer,  # VILA's own defaults
        select_feature=feature or "patch",
        unsaid=False,
        drops_first="mm_vision_select_feature='patch'" if feature in (None, "patch") else None,
    )


def _hugging_face(files: Files, raw: dict[str, Any], trust: Trust, *, weights: bool) -> Layout:
    """Read what transformers wrote: a vision model, or a larger one that has a `vision_config`."""
    config, vision, family = read_vision_config(files, raw, remote_code=trust.remote_code)
    layout = Layout(
        kind="vision model" if vision is config else f"{config.model_type} model",
        config=vision,
        family=family,
        preprocessor=_read_preprocessor(files),
    )
    if weights:
        tensors = find_tensors(files, allow_pickle=trust.allow_pickle)
        root = tensors.root(family.patch_embedding)
        if root is None:
            raise CheckpointError(
                f"{files.folder} holds no weights of a {family.name} tower: a model.safetensors, or shards of one, is "
                f"expected, with a tensor whose name ends in {family.patch_embedding}."
            )
        layout = replace(layout, tensors=tensors.select(root), root=root)
    return layout if vision is config else _read_hf_layer(layout, config, f"{files.folder}/config.json")


def _read_hf_layer(layout: Layout, config: Any, where: str) -> Layout:
    """Find which layer a model of transformers reads of its tower."""
    if is_contrastive(config, layout.config):
        return layout
    layer = read_vision_feature_layer(config)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if strategy is None:
        strategy = "default" if config.model_type == "vipllava" else "full"
    if strategy not in HF_FEATURES:
        known = " and ".join(HF_FEATURES)
        raise CheckpointError(f"{where}: vision_feature_select_strategy={strategy!r} is unknown: {known} are known.")
    return replace(
        layout,
        select_layer=layer,
        select_feature=HF_FEATURES[strategy],
        said_as="vision_feature_layer",
        unsaid=layer is None,
        drops_first=f"vision_feature_select_strategy={strategy!r}" if strategy == "default" else None,
    )


def _open_clip(files: Files, path: Path | None, trust: Trust, *, weights: bool) -> Layout:
    """Read OpenCLIP's config, and the tensors under ``visual.``."""
    written = files.read_json(open_clip.CONFIG)
    if written is None:
        raise CheckpointError(
            f"{path} has no {open_clip.CONFIG} beside it: an OpenCLIP tower's heads and activation are written "
            "nowhere else. The checkpoint's repository has it."
        )
    where = f"{files.folder}/{open_clip.CONFIG}"
    try:
        config = transformers.CLIPVisionConfig(**open_clip.vision_config(written))
        preprocessor = open_clip.preprocessor(written, square(config.image_size))
    except CheckpointError as err:
        raise CheckpointError(f"{where} {err}") from err
    except Exception as err:  # whatever comes of what the file holds
        raise CheckpointError(f"{where} could not be read: {one_line(err)}") from err
    family = family_of(config.model_type)
    check_vision_config(config, family, where)
    layout = Layout(
        kind="OpenCLIP checkpoint",
        config=config,
        family=family,
        preprocessor=preprocessor,
        translate=open_clip.translate,
    )
    if not weights:
        return layout
    tensors = list_tensors(files, _open_clip_weights(files, path), allow_pickle=trust.allow_pickle)
    root = tensors.root(open_clip.PATCH_EMBEDDING)
    if root is None:
        raise CheckpointError(
            f"{path or files.folder} holds no visual.{open_clip.PATCH_EMBEDDING}: it is no OpenCLIP ViT."
        )
    return replace(layout, tensors=tensors.select(root), root=root)


def _open_clip_weights(files: Files, path: Path | None) -> list[Path]:
    names = (path.name,) if path else open_clip.WEIGHTS
    for name in names:
        files.fetch(name)
        if (files.folder / name).is_file():
            return [files.folder / name]
    raise CheckpointError(f"{files.folder} holds no weights of OpenCLIP: {' or '.join(names)} is expected.")


def _read_preprocessor(files: Files) -> dict[str, Any] | None:
    """Read how images are prepared, from where transformers 4 or 5 writes it."""
    written = files.read_json("preprocessor_config.json")
    if written is None:
        written = (files.read_json("processor_config.json") or {}).get("image_processor")
    if written is not None and not isinstance(written, dict):
        raise CheckpointError(f"{files.folder}/processor_config.json: image_processor={written!r} is no object.")
    return written
