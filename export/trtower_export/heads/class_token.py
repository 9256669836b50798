"""The embedding of DINOv2 and DINOv3: the CLS token after the last norm, with the mean of the patches if asked."""

import torch
from torch import Tensor, nn

from trtower.head import CLS, CLS_MEAN, EMBEDDING
from trtower_export.heads.base import Head, Parts


class ClassToken(nn.Module):
    """Takes the first token: (B, P + N, D) -> (B, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Take the CLS token."""
        return tokens[:, 0]


class ClassAndMean(nn.Module):
    """Puts the first token beside the mean of the patches: (B, P + N, D) -> (B, 2 * D)."""

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Average the patches, without CLS and registers."""
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(dim=1)], dim=-1)


def _steps(parts: Parts) -> dict[str, nn.Module]:
    if parts.pool == CLS_MEAN:
        return {"cls_mean": ClassAndMean(1 + getattr(parts.config, "num_register_tokens", 0))}
    return {"cls": ClassToken()}


HEADS = (
    Head(
        name="CLS token",
        kind=EMBEDDING,
        model_types=("dinov2", "dinov2_with_registers", "dinov3_vit"),
        steps=_steps,
        pools=(CLS, CLS_MEAN),
    ),
)
