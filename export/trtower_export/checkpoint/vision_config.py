"""Read the vision config that transformers wrote, and check it, or OpenCLIP's, before anything is built from it.

A config.json may hold anything, and transformers may then raise anything, from a KeyError to a MemoryError. A config
must not choose code either: kernels and quantisers that it names are ignored.
"""

import copy
import re
from types import SimpleNamespace
from typing import Any

import transformers
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto

from trtower.errors import CheckpointError, one_line
from trtower_export.checkpoint.files import Files
from trtower_export.families import Family, family_of, is_exported, refusal
from trtower_export.families.base import square

VISION_CONFIG = "vision_config"
LANGUAGE_TYPES = {
    *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_patches")
CHANNELS = 3
"""Of the pixels that an engine accepts: red, green and blue."""
LARGEST_IMAGE = 8192
"""Pixels a side. Anything larger is a mistake: this already makes 342,225 patches of 14."""


def read_vision_config(
    files: Files, raw: dict[str, Any], *, remote_code: bool, tower: str | None = None
) -> tuple[Any, Any, Family]:
    """Return the whole config, the vision config (inside it, or the same) and the tower's family.

    A config may describe several towers, each under its own key; ``tower`` names the one to read. Raises
    CheckpointError.
    """
    where = f"{files.folder}/config.json"
    model_type = str(raw.get("model_type"))
    key = _key_of(raw, tower)
    _refuse_unsupported(raw, key, where)
    if raw.get("auto_map") and not remote_code:
        raise CheckpointError(
            f"{where} needs the checkpoint's own code (auto_map), which is not run by default: pass "
            "--trust-remote-code if you trust its author. If transformers has the model's own class, delete auto_map "
            "from a copy of the config instead."
        )
    try:
        config = _read_whole(files, raw, key, remote_code=remote_code)
    except CheckpointError:
        raise
    except Exception as err:  # a wrong value in the file can make transformers raise anything
        raise CheckpointError(f"{where} could not be read: {one_line(err)}") from err
    vision = getattr(config, key, config)
    if isinstance(vision, dict):  # under a key that this config class does not know
        vision = family_of(str(vision.get("model_type"))).vision_class.config_class(**vision)
    if vision is not config:
        _name_as_its_class(vision)
    family = family_of(str(getattr(vision, "model_type", model_type)))
    if vision is not config and not isinstance(raw.get(key), dict):
        raise CheckpointError(
            f"{where} has no vision_config, so it does not say which {family.name} tower the {model_type} has."
        )
    check_vision_config(vision, family, where)
    return config, vision, family


def _name_as_its_class(vision: Any) -> None:
    """Correct the `model_type` of a tower inside a model: files of older releases call Idefics3's "idefics3", too."""
    named = getattr(type(vision), "model_type", None)
    if is_exported(named) and not is_exported(getattr(vision, "model_type", None)):
        vision.model_type = named


def _read_whole(files: Files, raw: dict[str, Any], key: str, *, remote_code: bool) -> Any:
    """Read the whole config with transformers' class for it, or with the checkpoint's own if that is trusted."""
    model_type = str(raw.get("model_type"))
    if raw.get("auto_map"):
        return transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=remote_code)
    is_known = model_type in transformers.CONFIG_MAPPING
    if not is_known and isinstance(raw.get(key), dict):
        return SimpleNamespace(**raw)  # a custom model around a tower: only the tower's config is needed
    if is_known and not is_exported(model_type):
        return transformers.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(raw))
    # The family names the class: AutoConfig of transformers 4.57 does not know all of its vision models.
    config_class: Any = family_of(model_type).vision_class.config_class
    return config_class.from_pretrained(files.folder)


def _key_of(raw: dict[str, Any], tower: str | None) -> str:
    """Find the key of a tower's config: `image_config` for an `image_tower`, and `vision_config` by default."""
    described = [
        key
        for key, value in raw.items()
        if key.endswith("_config") and isinstance(value, dict) and is_exported(value.get("model_type"))
    ]
    named = [key for key in described if key.removesuffix("_config") in (tower or "")]
    return max(named, key=len, default=VISION_CONFIG)


def _refuse_unsupported(raw: dict[str, Any], key: str, where: str) -> None:
    """Raise CheckpointError for a tower without a family, before asking the user to trust the checkpoint's own code."""
    model_type, vision = str(raw.get("model_type")), raw.get(key)
    if refusal(model_type):
        family_of(model_type)  # raises with the reason, whatever is trusted
    if isinstance(vision, dict):
        tower_type = vision.get("model_type")
        if tower_type is not None and (raw.get("auto_map") or model_type not in transformers.CONFIG_MAPPING):
            family_of(str(tower_type))
    elif model_type in LANGUAGE_TYPES and not _describes_images(raw, model_type):
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is a language model without a vision tower, so there is nothing to "
            "export. A model that reads images has a vision_config."
        )
    elif raw.get("auto_map"):
        family_of(model_type)


def _describes_images(raw: dict[str, Any], model_type: str) -> bool:
    """Return whether a config, or the config class of its type, mentions images."""
    known = model_type in transformers.CONFIG_MAPPING
    parts = getattr(transformers.CONFIG_MAPPING[model_type], "sub_configs", {}) if known else {}
    return any(re.search("vision|visual|image", name) for name in (*raw, *parts))


def check_vision_config(vision: Any, family: Family, where: str) -> None:
    """Check a vision config against what every tower needs, and remove what would choose code."""
    vision._attn_implementation = "sdpa"
    if getattr(vision, "quantization_config", None) is not None:
        del vision.quantization_config  # quantised tensors are refused when they are read
    _check_counts(vision, where)
    for name in ("image_size", "patch_size"):
        _check_side(vision, name, where)
    if (activation := getattr(vision, "hidden_act", None)) not in (None, *ACT2FN):
        raise CheckpointError(f"{where}: transformers has no hidden_act={activation!r}.")
    for name in ("layer_norm_eps", "rms_norm_eps"):
        value = getattr(vision, name, 1e-6)
        if type(value) is not float or not 0 <= value < 1:
            raise CheckpointError(f"{where}: {name}={value!r}; expected a small float such as 1e-6.")
    if reason := family.obstacle(vision):
        raise CheckpointError(f"{where}: {reason}")
    for part in getattr(vision, "parts", ()):  # of a pair of towers
        check_vision_config(part, family_of(part.model_type), where)


def _check_counts(vision: Any, where: str) -> None:
    """Check layers, heads, widths and channels."""
    for name in COUNTS:
        value = getattr(vision, name, 1)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: the tower has {name}={value!r}; expected an integer of at least 1.")
    heads = getattr(vision, "num_attention_heads", 1)
    if vision.hidden_size % heads:
        raise CheckpointError(
            f"{where}: hidden_size={vision.hidden_size} is not a multiple of num_attention_heads={heads}."
        )
    channels = getattr(vision, "num_channels", CHANNELS)
    if type(channels) is not int or channels != CHANNELS:
        raise CheckpointError(
            f"{where}: the tower has num_channels={channels!r}; expected {CHANNELS}, because engines accept and the "
            f"image processor makes pixels of {CHANNELS} channels."
        )


def _check_side(vision: Any, name: str, where: str) -> None:
    """Check a size in pixels, a number or a pair; turn (n, n) into n if the tower's config class has a number."""
    value = getattr(vision, name, 1)
    sides = value if isinstance(value, list | tuple) else [value]
    if not sides or not all(type(side) is int and 1 <= side <= LARGEST_IMAGE for side in sides):
        raise CheckpointError(f"{where}: the tower has {name}={value!r}; expected 1 to {LARGEST_IMAGE} pixels a side.")
    if isinstance(value, list | tuple) and isinstance(getattr(type(vision)(), name), int) and square(value):
        setattr(vision, name, square(value))
