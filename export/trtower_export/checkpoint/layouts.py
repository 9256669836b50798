"""Recognise what a checkpoint is from its files: where its tower's config and tensors lie, and which layer it reads.

A tower comes in several forms: as Hugging Face writes it, by itself or inside a larger model; inside an original LLaVA
checkpoint, or as the separate tower that it names; in a folder inside a VILA checkpoint; inside a robot policy, whose
config names the model that it is built on or leaves that to its code; as timm has it, by itself, inside OpenCLIP's
file, or in OpenVLA. Configs and the names of tensors are read here, not the weights, and the checkpoint's own code runs
only if it is trusted.
"""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers

from trtower.errors import CheckpointError, one_line
from trtower.reading import is_contrastive, read_vision_feature_layer, says_trained
from trtower_export.checkpoint import adapters, open_clip
from trtower_export.checkpoint.files import Files, download, expanded, first_line
from trtower_export.checkpoint.layout import (
    Layout,
    Request,
    inside_model,
    no_tower,
    read_preprocessor,
    with_tower,
)
from trtower_export.checkpoint.not_checkpoints import checkpoints_in, refuse_bundle, refuse_file, refuse_folder
from trtower_export.checkpoint.prismatic import is_prismatic, recognise_prismatic
from trtower_export.checkpoint.tensors import Tensors, find_tensors, names_in
from trtower_export.checkpoint.timm import is_timm, recognise_timm
from trtower_export.checkpoint.vision_config import check_vision_config, read_vision_config
from trtower_export.families import family_of
from trtower_export.policies import Policy, PolicyTower, find_policy, openpi, refuse_other_policy
from trtower_export.recipes import Recipe, find_recipe

VILA_TOWER, VILA_PROJECTOR = "vision_tower", "mm_projector"

HF_FEATURES = {"default": "patch", "full": "cls_patch"}
"""transformers' `vision_feature_select_strategy`, in LLaVA's words."""


def from_recipe(recipe: Recipe) -> Layout:
    """Return the layout of a rehearsal, from the recipe of a well-known checkpoint."""
    vision = transformers.AutoConfig.for_model(**recipe.config)
    model: Any = SimpleNamespace(**recipe.model) if recipe.model else None
    if recipe.model and recipe.model["model_type"] in transformers.CONFIG_MAPPING and "text_config" in recipe.model:
        model = transformers.AutoConfig.for_model(**recipe.model, vision_config=vision.to_dict())
    elif "text_config" in recipe.model:
        model.vision_config = vision
    family = family_of(vision.model_type)
    return Layout(kind="recipe", config=vision, family=family, preprocessor=recipe.preprocessor, model=model)


def recognise(files: Files, request: Request) -> Layout:
    """Recognise what lies in ``files``; if the request includes weights, also find the tower's tensors and fetch them.

    Raises CheckpointError naming the file or field that is wrong.
    """
    refuse_bundle(files)
    raw = files.read_json("config.json")
    if raw is None and openpi.is_of_tensors(_names_beside(files)):
        raw = openpi.UNWRITTEN
    # timm's repositories have a config.json without a model_type beside OpenCLIP's config.
    if policy := find_policy(raw or {}):
        return _policy(files, raw or {}, policy, request)
    if raw is not None and is_prismatic(raw):
        return recognise_prismatic(files, raw, request)
    foreign = raw is None or not (raw.get("model_type") or _is_llava(raw))
    if foreign and files.read_json(open_clip.CONFIG) is not None:
        return open_clip.recognise_open_clip(files, None, request)
    if raw is None:
        adapters.refuse_adapter_alone(files)
        refuse_folder(files)
    if is_timm(raw):
        return recognise_timm(files, raw, request)
    inner = "vision_config" not in raw and (files.folder / VILA_TOWER / "config.json").is_file()
    if "vision_tower_cfg" in raw or inner:
        return _vila(files, raw, request)
    if _is_llava(raw):
        return _original_llava(files, raw, request)
    refuse_other_policy(raw, files.folder)
    if foreign and checkpoints_in(files.folder):
        refuse_folder(files, "its config.json has no model_type")
    return _hugging_face(files, raw, request)


def _names_beside(files: Files) -> set[str]:
    """List the tensors of a folder without a config; nothing if it has no readable file of the usual name."""
    path = files.folder / "model.safetensors"
    with suppress(CheckpointError):
        return names_in(path) if path.is_file() else set()
    return set()


def recognise_file(path: Path, request: Request) -> Layout:
    """Recognise a single file of weights: an OpenCLIP ViT, if its config lies beside it."""
    refuse_file(path, open_clip.CONFIG)
    return open_clip.recognise_open_clip(Files(folder=path.parent), path, request)


_LLAVA_KEYS = {"mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size", "mm_projector_type"}


def _is_llava(raw: dict[str, Any]) -> bool:
    names_llava = bool(_LLAVA_KEYS & raw.keys()) or str(raw.get("model_type")).startswith("llava")
    return names_llava and "vision_config" not in raw


def _original_llava(files: Files, raw: dict[str, Any], request: Request) -> Layout:
    """Read LLaVA's own checkpoint. It holds its tower in its shards, or only names one elsewhere."""
    named = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not isinstance(named, str):
        raise CheckpointError(
            f"{files.folder}/config.json is a LLaVA config without a tower: mm_vision_tower is {named!r}; "
            "expected a hub id or a folder."
        )
    if named.startswith("open_clip_hub:"):
        raise CheckpointError(
            f"{files.folder}/config.json names mm_vision_tower {named!r}. Export the OpenCLIP file itself. LLaVA-NeXT "
            "counts its layers without the embeddings: add 1 to --select-layer unless it is negative."
        )
    layout = _named_tower(files, named, replace(request, weights=False))
    around = None
    if request.weights:
        tensors = find_tensors(files, allow_pickle=request.trust.allow_pickle)
        around = lambda: tensors  # noqa: E731
        inner = with_tower(layout, tensors, layout.family.patch_embedding, request, larger=True)
        if inner is None and (trained := says_trained(raw.get)):
            raise CheckpointError(
                f"{files.folder}/config.json says that its tower was trained ({trained}), but the checkpoint holds no "
                f"{layout.family.name} tower, and {raw.get('mm_vision_tower')} has other weights. Export a checkpoint "
                "that holds the trained tower."
            )
        layout = inner or inside_model(_named_tower(files, named, request), files, tensors.shards)
    return replace(
        layout,
        kind="LLaVA checkpoint",
        preprocessor=layout.preprocessor or read_preprocessor(files),  # LLaVA uses that of the tower it names
        model=SimpleNamespace(**raw),
        around=around,
        said_as="mm_vision_select_layer",
        select_layer=raw.get("mm_vision_select_layer"),
        select_feature=raw.get("mm_vision_select_feature"),
        drops_first=None,
        contrastive=False,
        image_aspect_ratio=_aspect_ratio(raw),
    )


def _aspect_ratio(raw: dict[str, Any]) -> str | None:
    """Return how pictures are padded or tiled before LLaVA's processor sees them; None if they are not."""
    ratio = raw.get("image_aspect_ratio") or raw.get("vision_aspect_ratio")
    if ratio is None and raw.get("image_grid_pinpoints"):
        return "anyres"
    return None if ratio in (None, "square") else str(ratio)


def _named_tower(files: Files, named: str, request: Request, *, key: str = "mm_vision_tower") -> Layout:
    """Open the tower, or the model, that a config names. A rehearsal needs no hub if the tower has a recipe."""
    folder, recipe = expanded(named), find_recipe(named)
    try:
        if recipe and not request.weights and not folder.is_dir():
            return from_recipe(recipe)
        tower = Files(folder=folder) if folder.is_dir() else download(named, None)
        return _recognise_tower(tower, request)
    except (CheckpointError, OSError) as err:
        raise CheckpointError(
            f"{files.folder}/config.json names {key} {named!r}: {first_line(err)}. If it has moved, edit {key}."
        ) from err


def _recognise_tower(files: Files, request: Request) -> Layout:
    """Recognise a folder that must be a tower. A LLaVA checkpoint is refused, because it could name itself."""
    if _is_llava(files.read_json("config.json") or {}):
        raise CheckpointError(f"{files.folder} is itself a LLaVA checkpoint, not a tower")
    return recognise(files, request)


def _policy(files: Files, raw: dict[str, Any], policy: Policy, request: Request) -> Layout:
    """Read a robot policy, which holds the whole model that it is built on, under the names of its own code."""
    where = f"{files.folder}/config.json"
    try:
        reason = policy.obstacle(raw)
        said = None if reason else policy.read(raw)
    except (AttributeError, LookupError, TypeError, ValueError) as err:  # a wrong value in the file
        raise CheckpointError(f"{where} could not be read as that of a {policy.name}: {one_line(err)}.") from err
    if said is None:
        raise CheckpointError(f"{files.folder} is a {policy.name} whose tower cannot be exported: {reason}.")
    if isinstance(said.model, Recipe):
        layout = from_recipe(said.model)
    elif isinstance(said.model, dict):
        config, vision, family = read_vision_config(files, said.model, remote_code=False)
        layout = Layout(kind="", config=vision, family=family, preprocessor=read_preprocessor(files), model=config)
    else:
        layout = _named_tower(files, said.model, replace(request, weights=False), key=said.named_by)
    _refuse_other_model(layout, said, policy, where)
    for name, value in said.config.items():
        setattr(layout.config, name, value)
    check_vision_config(layout.config, layout.family, where)
    layout = replace(
        layout,
        kind=policy.name,
        preprocessor=said.preprocessor or layout.preprocessor,
        image_size=said.image_size,
        cameras=said.cameras,
        image_aspect_ratio=None,
        remarks=said.remarks,
    )
    if request.weights:
        tensors = find_tensors(files, allow_pickle=request.trust.allow_pickle)
        complete = with_tower(layout, tensors, layout.family.patch_embedding, request, larger=True)
        if complete is None:
            raise no_tower(tensors, f"the {layout.family.name} tower of a {policy.name}, in a model.safetensors")
        layout = complete
    if said.reads:
        layer, feature = said.reads
        return replace(layout, model=None, select_layer=layer, select_feature=feature, contrastive=False)
    return _read_hf_layer(layout, layout.model, where)


def _refuse_other_model(layout: Layout, said: PolicyTower, policy: Policy, where: str) -> None:
    """Raise CheckpointError if the model that a policy's config names is none that such a policy can be built on."""
    if said.families and layout.family.name not in said.families:
        raise CheckpointError(
            f"{where}: {said.named_by}={said.model!r} has a {layout.family.name} tower; that of a {policy.name} is one "
            f"of {', '.join(said.families)}."
        )
    if said.reads is None and layout.model is None:
        raise CheckpointError(
            f"{where}: {said.named_by}={said.model!r} is a vision tower by itself; that of a {policy.name} is inside a "
            "vision-language model."
        )


def _vila(files: Files, raw: dict[str, Any], request: Request) -> Layout:
    """Read the tower's folder in a VILA or NVILA checkpoint. Its position embeddings are already resized."""
    tower = files.inner(VILA_TOWER)
    config = tower.read_json("config.json")
    if config is None:
        raise CheckpointError(
            f"{tower.folder}/config.json is missing, and {files.folder}/config.json is VILA's, which keeps its tower "
            "in that folder. Download the whole checkpoint."
        )
    layer, feature = raw.get("mm_vision_select_layer"), raw.get("mm_vision_select_feature")
    return replace(
        inside_model(_hugging_face(tower, config, request), files, ()),
        kind="VILA checkpoint",
        model=SimpleNamespace(**raw),
        around=partial(_projector_of_vila, files, request) if request.weights else None,
        said_as="mm_vision_select_layer",
        select_layer=-2 if layer is None else layer,  # VILA's own defaults
        select_feature=feature or "patch",
        drops_first="mm_vision_select_feature='patch'" if feature in (None, "patch") else None,
        contrastive=False,
        image_aspect_ratio=_aspect_ratio(raw),
    )


def _projector_of_vila(files: Files, request: Request) -> Tensors:
    """Find the tensors in VILA's folder for its projector, under the names that they have in its model."""
    folder = files.inner(VILA_PROJECTOR)
    return find_tensors(folder, allow_pickle=request.trust.allow_pickle).inside(VILA_PROJECTOR)


def _hugging_face(files: Files, raw: dict[str, Any], request: Request) -> Layout:
    """Read what transformers wrote: a vision model, or a larger model with a `vision_config`."""
    remote_code = request.trust.remote_code
    config, vision, family = read_vision_config(files, raw, remote_code=remote_code, tower=request.tower)
    larger = vision is not config
    layout = Layout(
        kind=f"{config.model_type} model" if larger else "vision model",
        config=vision,
        family=family,
        preprocessor=read_preprocessor(files),
        image_aspect_ratio=_aspect_ratio(raw),
        model=config if larger else None,
    )
    if request.weights:
        tensors = find_tensors(files, allow_pickle=request.trust.allow_pickle)
        complete = with_tower(layout, tensors, family.patch_embedding, request, larger=larger)
        if complete is None:
            raise no_tower(
                tensors,
                f"a {family.name} tower; expected a model.safetensors or its shards, with a tensor whose name ends in "
                f"{family.patch_embedding}",
            )
        layout = complete
    return _read_hf_layer(layout, config, f"{files.folder}/config.json") if larger else layout


def _read_hf_layer(layout: Layout, config: Any, where: str) -> Layout:
    """Find which layer of its tower a transformers model reads."""
    if is_contrastive(config, layout.config):
        return replace(layout, contrastive=True)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if strategy is None:
        strategy = "default" if config.model_type == "vipllava" else "full"
    if strategy not in HF_FEATURES:
        known = " or ".join(HF_FEATURES)
        raise CheckpointError(f"{where}: unknown vision_feature_select_strategy {strategy!r}; choose {known}.")
    return replace(
        layout,
        said_as="vision_feature_layer",
        select_layer=read_vision_feature_layer(config),
        select_feature=HF_FEATURES[strategy],
        drops_first=f"vision_feature_select_strategy={strategy!r}" if strategy == "default" else None,
    )
