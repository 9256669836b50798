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
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from trtower.errors import CheckpointError
from trtower.layer_codes import LAST, LayerCode
from trtower_export import open_clip
from trtower_export.families import FAMILIES, Family, family_of, refusal
from trtower_export.files import Files, download
from trtower_export.recipes import Recipe, find_recipe
from trtower_export.weights import Tensors, find_tensors, list_tensors

VILA_TOWER = "vision_tower"

HF_FEATURES = {"default": "patch", "full": "cls_patch"}
"""transformers' `vision_feature_select_strategy`, in LLaVA's words."""

VISION_TYPES = {model_type for family in FAMILIES for model_type in family.model_types}

READS_LAST = ("paligemma", "gemma3", "cohere2_vision", "deepseek_vl", "blip-2", "fast_vlm")
"""Model types that read `last_hidden_state`, whatever their config says (transformers 5.23, `get_image_features`)."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a checkpoint may do that could run its author's code. Both are off unless the user asks."""

    allow_pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What was recognised. ``tensors`` are the tower's, their names beginning with ``root``; None for a rehearsal.

    ``select_layer`` and ``select_feature`` are what the config says, None where it says nothing; a model that reads
    a layer of its own choosing and does not say which has ``unsaid``. ``drops_first`` names the setting with which
    eager code drops a tower's first token.
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
    if raw is None and files.read_json(open_clip.CONFIG) is not None:
        return _open_clip(files, None, trust, weights=weights)
    if raw is None:
        raise CheckpointError(
            f"{files.folder} is no checkpoint: it has no config.json. A Hugging Face, LLaVA or VILA folder has one."
        )
    if "vision_tower_cfg" in raw or (files.folder / VILA_TOWER / "config.json").is_file():
        return _vila(files, raw, trust, weights=weights)
    if "vision_config" not in raw and (_LLAVA_KEYS & raw.keys() or str(raw.get("model_type")).startswith("llava")):
        return _original_llava(files, raw, trust, weights=weights)
    return _hugging_face(files, raw, trust, weights=weights)


def recognise_file(path: Path, trust: Trust, *, weights: bool) -> Layout:
    """Tell what a single file of weights is: an OpenCLIP ViT, if the config that belongs to it lies beside it."""
    return _open_clip(Files(folder=path.parent), path, trust, weights=weights)


_LLAVA_KEYS = {"mm_vision_tower", "mm_vision_select_layer", "mm_hidden_size", "mm_projector_type"}


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
    layout = _named_tower(files, named, trust, weights=False)
    if (files.folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{files.folder} is a LoRA adapter: merge it into its base model, and export that.")
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
        preprocessor=_read_preprocessor(files) or layout.preprocessor,
        select_layer=raw.get("mm_vision_select_layer"),
        select_feature=raw.get("mm_vision_select_feature", "patch"),
        unsaid="mm_vision_select_layer" not in raw,
    )


def _says_trained(raw: dict[str, Any]) -> str | None:
    """Find the key of LLaVA or LLaVA-NeXT that says that the tower it names is not the tower it was trained with."""
    if raw.get("unfreeze_mm_vision_tower"):
        return "unfreeze_mm_vision_tower"
    return "mm_tunable_parts" if "mm_vision_tower" in str(raw.get("mm_tunable_parts")) else None


def _named_tower(files: Files, named: str, trust: Trust, *, weights: bool) -> Layout:
    """Open the tower that a LLaVA config names; what is known of it as a recipe needs no hub."""
    folder, recipe = Path(named).expanduser(), find_recipe(named)
    if recipe and not weights and not folder.is_dir():
        return from_recipe(recipe)
    try:
        tower = Files(folder=folder) if folder.is_dir() else download(named, None)
    except CheckpointError as err:
        raise CheckpointError(f"{files.folder}/config.json names mm_vision_tower {named!r}: {err}") from err
    return recognise(tower, trust, weights=weights)


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
    where = f"{files.folder}/config.json"
    model_type = str(raw.get("model_type"))
    if refusal(model_type):
        family_of(model_type)  # raises with the reason, which no trust takes away
    if "auto_map" in raw and not trust.remote_code:
        raise CheckpointError(
            f"{where} asks for code of its own (auto_map), which is not run unless you trust its author: "
            "--trust-remote-code. A checkpoint of a standard class needs no auto_map: remove it from a copy."
        )
    config_class: Any = transformers.AutoConfig
    options = {"trust_remote_code": trust.remote_code}
    if "auto_map" not in raw and (model_type in VISION_TYPES or model_type not in transformers.CONFIG_MAPPING):
        # Named by its family: AutoConfig of 4.57 does not know all vision models that transformers 4.57 has.
        config_class, options = getattr(transformers, family_of(model_type).model_class).config_class, {}
    try:
        config = config_class.from_pretrained(files.folder, **options)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as err:
        raise CheckpointError(f"{where} could not be read: {' '.join(str(err).split())}") from err
    vision = getattr(config, "vision_config", config)
    family = family_of(str(getattr(vision, "model_type", model_type)))
    if reason := family.obstacle(vision):
        raise CheckpointError(f"{where}: {reason}")
    layout = Layout(
        kind="vision model" if vision is config else f"{model_type} model",
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
    return layout if vision is config else _read_hf_layer(layout, config, where)


def _read_hf_layer(layout: Layout, config: Any, where: str) -> Layout:
    """Find which layer a model of transformers reads of its tower."""
    if (
        layout.config.model_type == f"{config.model_type}_vision_model"
    ):  # CLIP and its like: they read none in particular
        return layout
    # VipLlava's has an s in transformers 4.57.
    layer = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    if config.model_type in READS_LAST or (config.model_type == "internvl" and layer == -1):
        layer = LAST
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if strategy is None:
        strategy = "default" if config.model_type == "vipllava" else "full"
    if strategy not in HF_FEATURES:
        known = " and ".join(HF_FEATURES)
        raise CheckpointError(f"{where}: vision_feature_select_strategy={strategy!r} is unknown: {known} are known.")
    return replace(
        layout,
        select_layer=list(layer) if isinstance(layer, tuple) else layer,
        select_feature=HF_FEATURES[strategy],
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
    settings = open_clip.vision_config(written)
    config = transformers.AutoConfig.for_model(**settings)
    layout = Layout(
        kind="OpenCLIP checkpoint",
        config=config,
        family=family_of(config.model_type),
        preprocessor=open_clip.preprocessor(written, config.image_size),
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
    processor = files.read_json("processor_config.json") or {}
    return files.read_json("preprocessor_config.json") or processor.get("image_processor")
