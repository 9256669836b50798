"""Turn the tensors of a timm ViT into those of the class of transformers that computes the same.

timm keeps q, k and v in one tensor, adds positions only to what has one, and has other names. OpenVLA and Prismatic
rename timm's `gamma` to `scale_factor`. Sources: timm's `VisionTransformer` and `AttentionPoolLatent`, the same from
0.9.10 to 1.0.31, and the layers of each class under the names that its checkpoints have.

Shapes: N patches, D features per token.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trtower.errors import CheckpointError


class Names(NamedTuple):
    """What one class of transformers calls what timm has: patterns and replacements, then q, k and v by themselves."""

    renames: tuple[tuple[str, str], ...]
    queries: tuple[str, str, str]


_LAYERS = r"^blocks\.(\d+)\."
_CLIP = Names(
    (
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^norm_pre\.", "pre_layrnorm."),
        (r"^norm\.", "post_layernorm."),
        (_LAYERS, r"encoder.layers.\1."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"^attn_pool\.latent$", "head.probe"),
        (r"^attn_pool\.proj\.", "head.attention.out_proj."),
        (r"^attn_pool\.norm\.", "head.layernorm."),
        (r"^attn_pool\.mlp\.", "head.mlp."),
    ),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
_DINOV2 = Names(
    (
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^norm\.", "layernorm."),
        (_LAYERS, r"encoder.layer.\1."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.ls(\d)\.(?:gamma|scale_factor)$", r".layer_scale\1.lambda1"),
    ),
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
)
NAMES = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _CLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
}
"""By the `model_type` of the class."""

_GATED = ((".mlp.fc1.", ".mlp.weights_in."), (".mlp.fc2.", ".mlp.weights_out."))
"""DINOv2's largest has a gate in its MLP."""


def translate(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Return the tensors of a timm ViT under the names, and in the shapes, of the class with this `model_type`.

    Raises CheckpointError if q, k and v cannot be told apart.
    """
    names, translated = NAMES[model_type], {}
    gated = _GATED if _is_gated(tensors) else ()
    for name, tensor in tensors.items():
        if fused := re.fullmatch(r"(blocks\.\d+)\.attn\.qkv\.(weight|bias)", name):
            layer = _renamed(f"{fused[1]}.", names)
            for query, part in zip(names.queries, _thirds(name, tensor), strict=True):
                translated[f"{layer}{query}.{fused[2]}"] = part
        elif not re.match(r"attn_pool\.(q|kv)\.", name):
            renamed = _renamed(name, names)
            for written, instead in gated:
                renamed = renamed.replace(written, instead)
            translated[renamed] = tensor
    return translated | _in_their_shapes(translated) | _pool(tensors)


def _renamed(name: str, names: Names) -> str:
    for pattern, replacement in names.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _thirds(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    if not tensor.ndim or tensor.shape[0] % 3:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}; expected q, k and v together, a multiple of 3 rows."
        )
    return torch.chunk(tensor, 3)


def _is_gated(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the first layer of an MLP makes a gate beside what the second one reads."""
    first, second = (tensors.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
    return first is not None and second is not None and first.ndim == 2 and first.shape[0] == 2 * second.shape[-1]


def _in_their_shapes(translated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shape class tokens and positions as transformers does; with registers, timm's CLS token has no position."""
    shaped: dict[str, Tensor] = {}
    if (token := translated.get("embeddings.class_embedding")) is not None:
        shaped["embeddings.class_embedding"] = token.flatten()
    if (positions := translated.get("embeddings.position_embedding.weight")) is not None:
        shaped["embeddings.position_embedding.weight"] = positions.flatten(0, -2)
    positions = translated.get("embeddings.position_embeddings")
    if positions is not None and "embeddings.register_tokens" in translated:
        none = positions.new_zeros(1, 1, positions.shape[-1])
        shaped["embeddings.position_embeddings"] = torch.cat([none, positions], dim=1)
    if (token := translated.get("embeddings.cls_token")) is not None:
        shaped["embeddings.mask_token"] = token.new_zeros(1, token.shape[-1])  # timm has none
    return shaped


def _pool(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the q, k and v of SigLIP's pooling head into one tensor, as `nn.MultiheadAttention` has them."""
    return {
        f"head.attention.in_proj_{kind}": torch.cat([tensors[f"attn_pool.{part}.{kind}"] for part in ("q", "kv")])
        for kind in ("weight", "bias")
        if {f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"} <= tensors.keys()
    }
