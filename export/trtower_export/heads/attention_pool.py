"""The embeddings of SigLIP, SigLIP 2 and AIMv2: a pooling head whose query attends to every patch.

An AIMv2 that was trained with a text tower then multiplies by a projection.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trtower.head import EMBEDDING
from trtower_export.families.base import replaced
from trtower_export.families.clip import flat
from trtower_export.heads.base import Head, Parts


class Attention(nn.Module):
    """An `nn.MultiheadAttention` taken apart, so that each of its products has a name and a weight of its own.

    The order of the arithmetic is torch's, so the numbers are the same.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        width = packed.embed_dim
        weights, biases = (each.split([width, 2 * width]) for each in (packed.in_proj_weight, packed.in_proj_bias))
        self.q_proj, self.kv_proj = (_linear(*each) for each in zip(weights, biases, strict=True))
        self.scores, self.context = _Scores(), _Context()
        self.out_proj, self.num_heads = packed.out_proj, packed.num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Attend with queries (B, 1, D) to tokens (B, N, D), which are both keys and values."""
        del value
        batch, count, width = key.shape
        heads = (self.num_heads, width // self.num_heads)
        q = self.q_proj(query).reshape(batch, 1, *heads).transpose(1, 2)
        k, v = self.kv_proj(key).reshape(batch, count, 2, *heads).permute(2, 0, 3, 1, 4)
        context = self.context(self.scores(q, k), v)
        return self.out_proj(context.transpose(1, 2).reshape(batch, 1, width)), None


class _Scores(nn.Module):
    """Gives the scores of a layer's attention a name, as `decompose_attention` does in the tower."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        scaled = query * math.sqrt(1 / query.shape[-1])
        return torch.softmax(torch.matmul(scaled, key.transpose(-2, -1)), dim=-1)


class _Context(nn.Module):
    def forward(self, shares: Tensor, value: Tensor) -> Tensor:
        return torch.matmul(shares, value)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return linear


SWITCHES = ("vision_use_head", "use_head")
"""What configs call the switch of the pooling head; without either there is one."""


def _obstacle(config: Any) -> str | None:
    vision = getattr(config, "vision_config", config)
    off = next((name for name in SWITCHES if getattr(vision, name, True) is False), None)
    return (
        off and f"{off} is false, so it has no pooling head and no embedding; without --head its patches are exported"
    )


def _own(config: Any) -> nn.Module:
    return nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)


def _steps(parts: Parts) -> dict[str, nn.Module]:
    pool = flat(parts.tower).head
    if isinstance(getattr(pool, "attention", None), nn.MultiheadAttention):
        pool = replaced(pool, attention=Attention(pool.attention))
    return {"pool": pool} | ({"projection": parts.own} if parts.own else {})


HEADS = (
    Head(
        name="attention pooling",
        kind=EMBEDDING,
        model_types=("siglip_vision_model", "siglip2_vision_model", "aimv2_vision_model"),
        steps=_steps,
        obstacle=_obstacle,
    ),
    Head(
        name="attention pooling and projection",
        kind=EMBEDDING,
        model_types=("aimv2",),
        attribute="visual_projection",
        own=_own,
        steps=_steps,
        obstacle=_obstacle,
    ),
)
