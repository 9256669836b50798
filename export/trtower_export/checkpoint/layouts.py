"""Recognise what a checkpoint is from its files: where its tower's config and tensors lie, and which layer it reads.

People hold a tower in four ways: as Hugging Face writes it, alone or inside a larger model; inside an original
LLaVA checkpoint, or in the tower that this names; in a folder of its own inside a VILA checkpoint; as an OpenCLIP
file. Only JSON is read here, and no code of the checkpoint is run unless it is trusted.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from trtower.errors import CheckpointError
from trtower.reading import is_contrastive, read_vision_feature_layer, says_trained
from trtower_export.checkpoint import adapters, open_clip
from trtower_export.checkpoint.files import Files, download, expanded, first_line
from trtower_export.checkpoint.layout import Layout, Request, inside_model, no_tower, with_tower
from trtower_export.checkpoint.not_checkpoints import checkpoints_in, refuse_bundle, refuse_file, refuse_folder
from trtower_export.checkpoint.tensors import find_tensors
from trtower_export.checkpoint.vision_config import read_vision_config
from trtower_export.families import family_of
from trtower_export.recipes import Recipe, find_recipe

VILA_TOWER = "vision_tower"

HF_FEATURES = {"default": "patch", "full": "cls_patch"}
"""transformers' `vision_feature_select_strategy`, in LLaVA's words."""


def from_recipe(recipe: Recipe) -> Layout:
    """Describe a rehearsal from what is known of a well-known checkpoint."""
    config = transformers.AutoConfig.for_model(**recipe.config)
    return Layout(kind="recipe", config=config, family=family_of(config.model_type), preprocessor=recipe.preprocessor)


def recognise(files: Files, request: Request) -> Layout:
    """Tell what lies in ``files``; if weights are asked for, also where its tensors are, and have them here.

    Raises CheckpointError naming the file or field that is wrong.
    """
    refuse_bundle(files)
    raw = files.read_json("config.json")
    # timm's repositories have a config.json of their own beside OpenCLIP's, which names no model type.
    foreign = raw is None or not (raw.get("model_type") or _is_llava(raw))
    if foreign and files.read_json(open_clip.CONFIG) is not None:
        return open_clip.recognise_open_clip(files, None, request)
    if raw is None:
        adapters.refuse_adapter_alone(files)
        refuse_folder(files)
    inner = "vision_config" not in raw and (files.folder / VILA_TOWER / "config.json").is_file()
    if "vision_tower_cfg" in raw or inner:
        return _vila(files, raw, request)
    if _is_llava(raw):
        return _original_llava(files, raw, request)
    if foreign and checkpoints_in(files.folder):
        refuse_folder(files, "its config.json names no model_type")
    return _hugging_face(files, raw, request)


def recognise_file(path: Path, request: Request) -> Layout:
    """Tell what a single file of weights is: an OpenCLIP ViT, if the config that belongs to it lies beside it."""
    refuse_file(path, open_clip.CONFIG)
    return open_clip.recognise_open_clip(Files(folder=path.parent), path, request)


_LLAVA_KEYS = {"mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size", "mm_projector_type"}


def _is_llava(raw: dict[str, Any]) -> bool:
    said = bool(_LLAVA_KEYS & raw.keys()) or str(raw.get("model_type")).startswith("llava")
    return said and "vision_config" not in raw


def _original_llava(files: Files, raw: dict[str, Any], request: Request) -> Layout:
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
    layout = _named_tower(files, named, replace(request, weights=False))
    if request.weights:
        tensors = find_tensors(files, allow_pickle=request.trust.allow_pickle)
        inner = with_tower(layout, tensors, layout.family.patch_embedding, request, larger=True)
        if inner is None and (trained := says_trained(raw.get)):
            raise CheckpointError(
                f"{files.folder}/config.json says that its tower was trained ({trained}), but the checkpoint holds no "
                f"{layout.family.name} tower: {raw.get('mm_vision_tower')} would have other weights."
            )
        layout = inner or inside_model(_named_tower(files, named, request), files, tensors.shards)
    return replace(
        layout,
        kind="LLaVA checkpoint",
        preprocessor=layout.preprocessor or _read_preprocessor(files),  # LLaVA takes that of the tower it names
        said_as="mm_vision_select_layer",
        select_layer=raw.get("mm_vision_select_layer"),
        select_feature=raw.get("mm_vision_select_feature"),
        drops_first=None,
        contrastive=False,
        image_aspect_ratio=_aspect_ratio(raw),
    )


def _aspect_ratio(raw: dict[str, Any]) -> str | None:
    """Find how pictures are padded or tiled before LLaVA's processor sees them; None if they are not."""
    said = raw.get("image_aspect_ratio") or raw.get("vision_aspect_ratio")
    if said is None and raw.get("image_grid_pinpoints"):
        return "anyres"
    return None if said in (None, "square") else str(said)


def _named_tower(files: Files, named: str, request: Request) -> Layout:
    """Open the tower that a LLaVA config names; what is known of it as a recipe needs no hub."""
    folder, recipe = expanded(named), find_recipe(named)
    try:
        if recipe and not request.weights and not folder.is_dir():
            return from_recipe(recipe)
        tower = Files(folder=folder) if folder.is_dir() else download(named, None)
        return _recognise_tower(tower, request)
    except (CheckpointError, OSError) as err:
        raise CheckpointError(
            f"{files.folder}/config.json names mm_vision_tower {named!r}: {first_line(err)}. Edit mm_vision_tower "
            "where the tower is elsewhere now."
        ) from err


def _recognise_tower(files: Files, request: Request) -> Layout:
    """Tell what lies in a folder that must be a tower; one LLaVA checkpoint that names another could name itself."""
    if _is_llava(files.read_json("config.json") or {}):
        raise CheckpointError(f"{files.folder} is a LLaVA checkpoint itself, and no tower")
    return recognise(files, request)


def _vila(files: Files, raw: dict[str, Any], request: Request) -> Layout:
    """Read the tower's own folder in a VILA or NVILA checkpoint; its position embeddings are resized already."""
    tower = files.inner(VILA_TOWER)
    config = tower.read_json("config.json")
    if config is None:
        raise CheckpointError(
            f"{tower.folder}/config.json is missing: {files.folder}/config.json is VILA's, and its tower lies there."
        )
    layer, feature = raw.get("mm_vision_select_layer"), raw.get("mm_vision_select_feature")
    return replace(
        inside_model(_hugging_face(tower, config, request), files, ()),
        kind="VILA checkpoint",
        said_as="mm_vision_select_layer",
        select_layer=-2 if layer is None else layer,  # VILA's own defaults
        select_feature=feature or "patch",
        drops_first="mm_vision_select_feature='patch'" if feature in (None, "patch") else None,
        contrastive=False,
        image_aspect_ratio=_aspect_ratio(raw),
    )


def _hugging_face(files: Files, raw: dict[str, Any], request: Request) -> Layout:
    """Read what transformers wrote: a vision model, or a larger one that has a `vision_config`."""
    remote_code = request.trust.remote_code
    config, vision, family = read_vision_config(files, raw, remote_code=remote_code, tower=request.tower)
    larger = vision is not config
    layout = Layout(
        kind=f"{config.model_type} model" if larger else "vision model",
        config=vision,
        family=family,
        preprocessor=_read_preprocessor(files),
        image_aspect_ratio=_aspect_ratio(raw),
    )
    if request.weights:
        tensors = find_tensors(files, allow_pickle=request.trust.allow_pickle)
        found = with_tower(layout, tensors, family.patch_embedding, request, larger=larger)
        if found is None:
            raise no_tower(
                tensors,
                f"a {family.name} tower: a model.safetensors, or shards of one, is expected, with a tensor whose name "
                f"ends in {family.patch_embedding}",
            )
        layout = found
    return _read_hf_layer(layout, config, f"{files.folder}/config.json") if larger else layout


def _read_hf_layer(layout: Layout, config: Any, where: str) -> Layout:
    """Find which layer a model of transformers reads of its tower."""
    if is_contrastive(config, layout.config):
        return replace(layout, contrastive=True)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if strategy is None:
        strategy = "default" if config.model_type == "vipllava" else "full"
    if strategy not in HF_FEATURES:
        known = " and ".join(HF_FEATURES)
        raise CheckpointError(f"{where}: vision_feature_select_strategy={strategy!r} is unknown: {known} are known.")
    return replace(
        layout,
        said_as="vision_feature_layer",
        select_layer=read_vision_feature_layer(config),
        select_feature=HF_FEATURES[strategy],
        drops_first=f"vision_feature_select_strategy={strategy!r}" if strategy == "default" else None,
    )


def _read_preprocessor(files: Files) -> dict[str, Any] | None:
    """Read how images are prepared, from where transformers 4 or 5 writes it."""
    written = files.read_json("preprocessor_config.json")
    if written is None:
        written = (files.read_json("processor_config.json") or {}).get("image_processor")
    if written is not None and not isinstance(written, dict):
        raise CheckpointError(f"{files.folder}/processor_config.json: image_processor={written!r} is no object.")
    return written
