"""The projectors of the original LLaVA, LLaVA-NeXT and VILA, by the name that `mm_projector_type` gives them.

Their code is not a package that can be installed, so the few modules are written here, with the names that the tensors
have in checkpoints. Sources: `multimodal_projector/builder.py` of LLaVA and LLaVA-NeXT, `base_projector.py` of VILA.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from math import isqrt
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from trtower_export.heads.base import Head


class ResidualBlock(nn.Module):
    """LLaVA-NeXT's block after an MLP: a norm, and two linear layers around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """Add the two layers to the normed features, as LLaVA-NeXT does: the norm is outside the sum."""
        normed = self.pre_norm(features)
        residual: Tensor = normed + self.proj(normed)
        return residual


class Downsample(nn.Module):
    """VILA's blocks: r x r patches side by side, after zeros fill the grid up: (B, N, D) -> (B, N / r², D * r²)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, patches: Tensor) -> Tensor:
        """Put squares of patches side by side; the features of one row of a square follow each other."""
        batch, count, width = patches.shape
        grid, side = isqrt(count), self.side
        padding = -grid % side
        padded = functional.pad(patches.reshape(batch, grid, grid, width), (0, 0, 0, padding, 0, padding))
        small = (grid + padding) // side
        squares = padded.reshape(batch, small, side, small, side, width).permute(0, 1, 3, 2, 4, 5)
        return squares.reshape(batch, small**2, side**2 * width)


class _VilaProjector(nn.Module):
    """VILA's model around its layers."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.layers(features)
        return projected


DOWNSAMPLING: dict[str, tuple[int, tuple[Fraction | int, ...]]] = {
    "mlp_downsample": (2, ()),
    "mlp_downsample_2x2_fix": (2, ()),
    "mlp_downsample_3x3_fix": (3, (3,)),
    "mlp_downsample_3x3_s2": (3, (3, 1, Fraction(1, 3))),
    "mlp_downsample_3x3_s2_new": (3, (4, 2, 1, Fraction(1, 3))),
}
"""VILA's types: patches along the side of a square, and the widths of the inner layers, in widths of the tower."""


def _type(config: Any) -> str:
    cfg = getattr(config, "mm_projector_cfg", None)
    inner = cfg.get("mm_projector_type") if isinstance(cfg, dict) else None
    return str(getattr(config, "mm_projector_type", None) or inner or "linear")


def _text_width(config: Any) -> Any:
    width = getattr(config, "hidden_size", None)
    cfg = getattr(config, "llm_cfg", None)
    return cfg.get("hidden_size") if width is None and isinstance(cfg, dict) else width


def _mlp(depth: int, width: int, out: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(width, out)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(out, out)]
    return layers


def _downsampling(side: int, inner: Sequence[Fraction | int], width: int, out: int) -> list[nn.Module]:
    widths = [
        side**2 * width,
        *(int(width * factor) if factor >= 1 else width // round(1 / factor) for factor in inner),
    ]
    layers: list[nn.Module] = [Downsample(side)]
    for before, after in zip(widths, [*widths[1:], out], strict=True):
        layers += [nn.LayerNorm(before), nn.Linear(before, after), nn.GELU()]
    return [*layers, nn.Linear(out, out)]


def _layers(kind: str, width: int, out: int) -> nn.Module:
    """Build the layers of a type."""
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, out)
    if kind in DOWNSAMPLING:
        return nn.Sequential(*_downsampling(*DOWNSAMPLING[kind], width, out))
    match = re.fullmatch(r"mlp(\d+)x_(?:res(\d+)x_)?gelu", kind)
    assert match is not None  # noqa: S101 - _obstacle refuses other types
    blocks = [ResidualBlock(out) for _ in range(int(match[2] or 0))]
    return nn.Sequential(*_mlp(int(match[1]), width, out), *blocks)


def _own(config: Any) -> nn.Module:
    layers = _layers(_type(config), config.mm_hidden_size, _text_width(config))
    return _VilaProjector(layers) if _is_vila(config) else layers


def _is_vila(config: Any) -> bool:
    return hasattr(config, "vision_tower_cfg") or hasattr(config, "mm_projector_cfg")


def _obstacle(config: Any) -> str | None:
    kind, out = _type(config), "leave out --head, and let the model's own code project"
    if scales := next((name for name in ("s2", "dynamic_s2") if getattr(config, name, False)), None):
        return f"with {scales} its projector reads the merged map of several scales, not what a tower returns; {out}"
    if resampler := getattr(config, "mm_resampler_type", None):
        return f"its mm_resampler_type {resampler!r} is a network between tower and projector; {out}"
    widths = {"mm_hidden_size": getattr(config, "mm_hidden_size", None), "hidden_size": _text_width(config)}
    if wrong := next((name for name, width in widths.items() if type(width) is not int or width < 1), None):
        return f"its config.json has {wrong}={widths[wrong]!r}, where its projector needs a number of features; {out}"
    if kind in ("identity", "linear", *DOWNSAMPLING) or re.fullmatch(r"mlp[1-9]\d*x_(?:res\d+x_)?gelu", kind):
        return None
    return f"its mm_projector_type {kind!r} is none that trtower exports; {out}"


HEADS = (
    Head(
        name="mm_projector",
        belongs=lambda config: not hasattr(config, "vision_config") and hasattr(config, "mm_hidden_size"),
        attribute="mm_projector",
        own=_own,
        describe=_type,
        settings=("mm_projector_type",),
        obstacle=_obstacle,
    ),
)
