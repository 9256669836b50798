"""Read a ViT of timm as the class of transformers that computes the same: SigLIP, DINOv2 or CLIP.

Sizes are in timm's code, under the name of an architecture. The tables repeat those of timm 1.0.31; `make
test-lerobot` compares them with 0.9.16, which has fewer architectures and the same sizes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor

from trtower.errors import CheckpointError, one_line
from trtower.timm_names import translate
from trtower_export.checkpoint.files import Files
from trtower_export.checkpoint.layout import Layout, Request, no_tower, with_tower
from trtower_export.checkpoint.tensors import find_tensors
from trtower_export.checkpoint.vision_config import LARGEST_IMAGE, check_vision_config
from trtower_export.families import family_of
from trtower_export.families.base import square

PATCH_EMBEDDING = "patch_embed.proj.weight"

SIZES: dict[str, tuple[int, int, int]] = {
    "xsmall": (256, 10, 4),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "betwixt": (640, 12, 10),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "so400m": (1152, 27, 16),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
    "giantopt": (1536, 40, 16),
    "gigantic": (1664, 48, 16),
}
"""Width, layers and heads."""

GIANT_DINOV2 = (1536, 40, 24)
MLP_RATIOS = {"so400m": 3.7362, "giant": 48 / 11, "gigantic": 64 / 13}
"""Where it is not 4."""

TANH = re.compile(r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip|vit_large_patch16_siglip(_gap)?_512")
"""SigLIPs whose activation is timm's "gelu_tanh"; that of the others is the exact GELU."""

ACTIVATIONS = {None: None, "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
"""timm's names for activations, and transformers'."""

FILTERS = {"bilinear": 2, "bicubic": 3}
"""Pillow's numbers for the filters that timm and OpenCLIP name."""

KNOWN = "vit_…_siglip…, vit_…_dinov2 and vit_…_clip…"

NAME = re.compile(
    r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)_"
    r"(?:(?P<siglip>siglip)(?P<gap>_gap)?|(?P<registers>reg4_)?(?P<dinov2>dinov2)|(?P<clip>clip)(?P<quick>_quickgelu)?)"
    r"(?:_(?P<side>\d+))?"
)


def describe_timm(architecture: str, image_size: int | None = None, act_layer: str | None = None) -> dict[str, Any]:
    """Return the vision config of an architecture of timm, whose name may end in a tag, such as ".webli".

    Args:
        architecture: timm's name, such as "vit_so400m_patch14_siglip_224".
        image_size: S, in pixels a side. By default that of the name; 518 for DINOv2.
        act_layer: timm's name of an activation to have instead of the architecture's.

    Returns:
        The settings, with a `model_type`.

    Raises:
        CheckpointError: if the architecture or the activation is none of these.
    """
    if image_size is not None and (type(image_size) is not int or not 1 <= image_size <= LARGEST_IMAGE):
        raise CheckpointError(f"its images have {image_size!r} pixels a side; expected 1 to {LARGEST_IMAGE}.")
    match = NAME.fullmatch(architecture.partition(".")[0])
    if match is None or match["size"] not in SIZES:
        raise CheckpointError(f"timm's {architecture!r} is none that trtower exports; it exports {KNOWN}.")
    if not isinstance(act_layer, str | None) or act_layer not in ACTIVATIONS:
        known = ", ".join(filter(None, ACTIVATIONS))
        raise CheckpointError(f"its activation {act_layer!r} is none that trtower knows; it knows {known}.")
    size = match["size"]
    giant = match["dinov2"] and size == "giant"
    width, layers, heads = GIANT_DINOV2 if giant else SIZES[size]
    ratio = 4.0 if match["dinov2"] else MLP_RATIOS.get(size, 4.0)
    activation = "gelu_tanh" if TANH.match(architecture) else "quick_gelu" if match["quick"] else "gelu"
    config = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": int(match["side"] or 518) if image_size is None else image_size,
        "patch_size": int(match["patch"]),
        "layer_norm_eps": 1e-5 if match["clip"] else 1e-6,
        "hidden_act": ACTIVATIONS[act_layer or activation],
    }
    if match["dinov2"]:
        registers = {"num_register_tokens": 4} if match["registers"] else {}
        kind = "dinov2_with_registers" if registers else "dinov2"
        return config | registers | {"model_type": kind, "mlp_ratio": 4, "use_swiglu_ffn": bool(giant)}
    config["intermediate_size"] = int(width * ratio)
    if match["siglip"]:
        return config | {"model_type": "siglip_vision_model", "vision_use_head": not match["gap"]}
    return config | {"model_type": "clip_vision_model"}


def translator(config: Any) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Return what turns timm's tensors into those of a tower with this config."""
    return lambda tensors: translate(tensors, config.model_type)


def not_pooled(pool: Any, config: Any) -> str | None:
    """Return why timm's pooled vector is not an embedding here, if it is not: SigLIP's head, or DINOv2's CLS token."""
    pools = {"siglip_vision_model": "map", "dinov2": "token", "dinov2_with_registers": "token"}
    usual = pools.get(config.model_type)
    if usual is not None and pool in (None, usual):
        return None
    pooled = f"global_pool={pool!r}" if usual else "a CLIP of timm has no projection, and"
    return f"{pooled} pools otherwise than trtower does; without --head its hidden states are exported"


def is_timm(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is timm's own, or that of transformers' wrapper around a model of timm."""
    return "architecture" in raw and raw.get("model_type") in (None, "timm_wrapper")


def recognise_timm(files: Files, raw: Mapping[str, Any], request: Request) -> Layout:
    """Read a repository of timm, or what transformers' `TimmWrapperModel` saved.

    Raises CheckpointError if its architecture is no ViT that is exported, or has other settings than its name says.
    """
    where = f"{files.folder}/config.json"
    prepares = raw.get("pretrained_cfg")
    if not isinstance(prepares, dict):
        raise CheckpointError(f"{where}: pretrained_cfg={prepares!r}; expected timm's settings of a model.")
    changes = raw.get("model_args") or {}
    if not isinstance(changes, dict) or changes.keys() - {"img_size"}:
        raise CheckpointError(
            f"{where}: model_args={changes!r} changes the architecture, but trtower exports timm's as they are, at any "
            "img_size."
        )
    side = prepares.get("input_size")
    size = square(side[1:]) if isinstance(side, list | tuple) and len(side) == 3 else 0
    if changes and changes["img_size"] != size:
        raise CheckpointError(f"{where}: model_args={changes!r}, but pretrained_cfg prepares input_size={side!r}.")
    if type(size) is not int or size < 1:
        raise CheckpointError(f"{where}: input_size={side!r}; expected [3, S, S], with S pixels a side.")
    try:
        config = transformers.AutoConfig.for_model(**describe_timm(str(raw["architecture"]), size))
        preprocessor = _preprocessor(prepares, size)
    except CheckpointError as err:
        raise CheckpointError(f"{where}: {err}") from err
    except Exception as err:  # a wrong value in the file can raise anything
        raise CheckpointError(f"{where} could not be read: {one_line(err)}") from err
    family = family_of(config.model_type)
    check_vision_config(config, family, where)
    layout = Layout(
        kind="model of timm",
        config=config,
        family=family,
        preprocessor=preprocessor,
        translate=translator(config),
        not_pooled=not_pooled(raw.get("global_pool"), config),
    )
    if not request.weights:
        return layout
    tensors = find_tensors(files, allow_pickle=request.trust.allow_pickle)
    complete = with_tower(layout, tensors, PATCH_EMBEDDING, request, larger=False)
    if complete is None:
        raise no_tower(tensors, f"a {raw['architecture']} of timm, with a tensor {PATCH_EMBEDDING}")
    return complete


def _preprocessor(prepares: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Turn timm's `pretrained_cfg` into a preprocessor_config.json: its transform for inference."""
    mode, kept = prepares.get("crop_mode", "center"), prepares.get("crop_pct", 0.875)
    interpolation = prepares.get("interpolation", "bilinear")
    if mode not in ("center", "squash") or interpolation not in FILTERS or not 0 < kept <= 1:
        raise CheckpointError(
            f"crop_mode={mode!r}, crop_pct={kept!r} and interpolation={interpolation!r} of pretrained_cfg; expected "
            "center or squash, a share of at most 1, and bilinear or bicubic."
        )
    scaled = math.floor(size / kept)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": scaled} if mode == "center" else {"height": scaled, "width": scaled},
        "crop_size": {"height": size, "width": size},
        "crop_like": "torchvision",
        "resample": FILTERS[interpolation],
        "image_mean": prepares["mean"],
        "image_std": prepares["std"],
    }
