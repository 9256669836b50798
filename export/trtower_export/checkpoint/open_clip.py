"""Read an OpenCLIP ViT as a `CLIPVisionModel`: OpenCLIP has another config, other names, and q, k and v in one tensor.

If its tower is a ViT of timm, that is read as `timm.py` does. Names and defaults come from open_clip's `CLIPVisionCfg`,
`VisionTransformer` and `TimmModel`.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from trtower.errors import CheckpointError, one_line
from trtower_export.checkpoint.files import Files
from trtower_export.checkpoint.layout import Layout, Request, with_tower
from trtower_export.checkpoint.tensors import list_tensors
from trtower_export.checkpoint.timm import FILTERS, describe_timm, translator
from trtower_export.checkpoint.timm import PATCH_EMBEDDING as PATCH_EMBEDDING_OF_TIMM
from trtower_export.checkpoint.vision_config import check_vision_config
from trtower_export.families import family_of
from trtower_export.families.base import square

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PATCH_EMBEDDING = "conv1.weight"

_DEFAULTS = {"width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_INERT = {"patch_dropout", "pos_embed_type", "pool_type", "output_tokens", "final_ln_after_pool"}
_INERT |= {"attentional_pool", "attn_pooler_queries", "attn_pooler_heads"}
"""Settings of `vision_cfg` that matter only in training, that the weights hold anyway, or that concern the final
pooling. With any other setting the architecture is not CLIP's."""

TRUNK = "timm_model_name"
_OF_TRUNK = {TRUNK, "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"}
_OF_TRUNK |= {*_DEFAULTS, *_INERT}
"""Settings of `vision_cfg` beside a ViT of timm. OpenCLIP reads none of its own then, but the size of its images."""

_RENAMES = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.weight$", "embeddings.patch_embedding.weight"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
WITHOUT_HEAD = "without --head its hidden states are exported"
_FUSED = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)$")


def recognise_open_clip(files: Files, path: Path | None, request: Request) -> Layout:
    """Read OpenCLIP's config, and find the tensors under ``visual.``."""
    written = files.read_json(CONFIG) or {}
    where = f"{files.folder}/{CONFIG}"
    try:
        config = AutoConfig.for_model(**vision_config(written))
        prepares = preprocessor(written, square(config.image_size))
    except CheckpointError as err:
        raise CheckpointError(f"{where} {err}") from err
    except Exception as err:  # a wrong value in the file can raise anything
        raise CheckpointError(f"{where} could not be read: {one_line(err)}") from err
    family = family_of(config.model_type)
    check_vision_config(config, family, where)
    has_trunk = bool(written.get("model_cfg", written)["vision_cfg"].get(TRUNK))
    layout = Layout(
        kind="OpenCLIP checkpoint",
        config=config,
        family=family,
        preprocessor=prepares,
        translate=translator(config) if has_trunk else translate,
        head_root="visual.proj",
        not_pooled=_not_pooled(written),
        translate_head=translate_head,
        contrastive=True,
    )
    if not request.weights:
        return layout
    paths = _find_weights(files, path)
    tensors = list_tensors(files, paths, allow_pickle=request.trust.allow_pickle)
    patch_embedding = PATCH_EMBEDDING_OF_TIMM if has_trunk else PATCH_EMBEDDING
    complete = with_tower(layout, tensors, patch_embedding, request, larger=True)
    if complete is None:
        name = f"visual.{'trunk.' if has_trunk else ''}{patch_embedding}"
        raise CheckpointError(f"{path or files.folder} holds no {name}: it is not the ViT that its config describes.")
    return complete


def _not_pooled(written: dict[str, Any]) -> str | None:
    """Return why its embedding is not the projected CLS token, or SigLIP's pooled vector, if it is not."""
    vision = written.get("model_cfg", written)["vision_cfg"]
    if vision.get(TRUNK):
        pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear") or "none"
        if (pool, projection) == ("map", "none") and "_siglip" in vision[TRUNK]:
            return None
        return f"timm_pool={pool!r} and timm_proj={projection!r} pool otherwise than SigLIP does; {WITHOUT_HEAD}"
    pooled = {"pool_type": vision.get("pool_type", "tok"), "attentional_pool": vision.get("attentional_pool") or False}
    other = next((f"{name}={value!r}" for name, value in pooled.items() if value not in ("tok", False)), None)
    return other and f"{other} pools otherwise than by the CLS token; {WITHOUT_HEAD}"


def _find_weights(files: Files, path: Path | None) -> list[Path]:
    names = (path.name,) if path else WEIGHTS
    for name in names:
        files.fetch(name)
        if (files.folder / name).is_file():
            return [files.folder / name]
    raise CheckpointError(f"{files.folder} holds no OpenCLIP weights; expected {' or '.join(names)}.")


def vision_config(written: dict[str, Any]) -> dict[str, Any]:
    """Turn an open_clip_config.json into a vision config, with its `model_type`.

    Raises CheckpointError if it is not a plain ViT, or one of timm that is exported. The caller puts the file's name
    before the message.
    """
    model = written.get("model_cfg", written)
    vision = model.get("vision_cfg")
    if not isinstance(vision, dict):
        raise CheckpointError("has no model_cfg.vision_cfg, so it does not describe a vision tower.")
    trunk = vision.get(TRUNK)
    known = _OF_TRUNK if trunk else {*_DEFAULTS, *_INERT}
    other = sorted(name for name, value in vision.items() if value and name not in known)
    if trunk and other:
        raise CheckpointError(f"has {other[0]}={vision[other[0]]!r} beside {TRUNK}, which trtower does not know.")
    if trunk:
        try:
            return describe_timm(str(trunk), vision.get("image_size"))
        except CheckpointError as err:
            raise CheckpointError(f"has {TRUNK}: {err}") from err
    vision = _DEFAULTS | vision
    if other or not isinstance(vision["layers"], int):
        reason = f"{other[0]}={vision[other[0]]!r}" if other else f"layers={vision['layers']!r}, a ResNet"
        raise CheckpointError(
            f"has {reason}, which transformers' CLIP tower does not support: "
            "export the checkpoint's conversion to transformers, if there is one."
        )
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "hidden_size": vision["width"],
        "image_size": vision["image_size"],
        "intermediate_size": int(vision["width"] * float(vision["mlp_ratio"])),
        "layer_norm_eps": 1e-5,
        "num_attention_heads": vision["width"] // vision["head_width"],
        "num_hidden_layers": vision["layers"],
        "patch_size": vision["patch_size"],
        "projection_dim": model.get("embed_dim", 512),
    }


def preprocessor(written: dict[str, Any], image_size: int) -> dict[str, Any] | None:
    """Turn OpenCLIP's preprocess_cfg into a preprocessor_config.json; None if it has none.

    Raises CheckpointError as `vision_config` does.
    """
    config = written.get("preprocess_cfg")
    if config is None:
        return None
    square = {"height": image_size, "width": image_size}
    mode = config.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise CheckpointError(f"has resize_mode={mode!r}, which is not supported; expected shortest or squash.")
    squashed = mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": not squashed,
        "size": square if squashed else {"shortest_edge": image_size},
        "crop_size": square,
        "crop_like": "torchvision",
        "resample": FILTERS[config.get("interpolation", "bicubic")],
        "image_mean": config["mean"],
        "image_std": config["std"],
    }


def translate_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn OpenCLIP's projection (D, E) into the weight of a linear layer, (E, D)."""
    (projection,) = tensors.values()
    return {"weight": projection.T}


def translate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename OpenCLIP's tensors (named without ``visual.``), split q, k and v, and drop the projection."""
    translated: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if fused := _FUSED.match(name):
            if not tensor.ndim or tensor.shape[0] % 3:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)}; expected q, k and v together, a multiple of 3 rows."
                )
            layer = fused[1].replace("transformer.resblocks", "encoder.layers")
            for projection, part in zip("qkv", torch.chunk(tensor, 3), strict=True):
                translated[f"{layer}.self_attn.{projection}_proj.{fused[2]}"] = part
        elif name != "proj":
            for pattern, replacement in _RENAMES:
                name = re.sub(pattern, replacement, name)
            translated[name] = tensor
    return translated
