"""S2: turn images into tiles of the engine's size at several scales, and the tiles' features into one grid.

The arithmetic around the engine is that of `forward` in s2wrapper (github.com/bfshi/scaling_on_scales, core.py):
pixels are resized bicubically and features averaged over areas, both in FP32, and rounded to the dtype of the images.
s2wrapper calls the tower once per scale; here the tiles of all scales run together.

Shapes: B images, H pixels per side, S pixels per tile side, K tiles per image over all scales and n along a side at one
scale, P prefix tokens, N patches per tile and p along its side, M patches per image, D features per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from trtower.bundle.manifest import Manifest
from trtower.errors import ConfigError
from trtower.runners.base import Runner
from trtower.tower.images import Images
from trtower.tower.pick import Pick

DEFAULT_SCALES = "336,672,1008"
"""LLaVA's default, if a config has no `s2_scales`."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The sizes at which an image is read, in ascending order, and the size of the tiles that each is cut into.

    The features of every scale are resized to the grid of ``sizes[output_index]``.
    """

    sizes: tuple[int, ...]
    tile_size: int
    output_index: int = 0

    def __post_init__(self) -> None:
        sizes = ",".join(map(str, self.sizes))
        if any(size % self.tile_size for size in self.sizes):
            raise ConfigError(
                f"s2_scales={sizes} cannot be cut into tiles of {self.tile_size} pixels: "
                f"expected multiples of {self.tile_size}."
            )
        if not -len(self.sizes) <= self.output_index < len(self.sizes):
            raise ConfigError(
                f"s2_resize_output_to_scale_idx={self.output_index} is outside s2_scales={sizes}; "
                f"expected {-len(self.sizes)} to {len(self.sizes) - 1}."
            )

    @classmethod
    def from_config(cls, args: Any) -> "Scales":
        """Read `s2_scales` of a model's config, and VILA's `s2_max_split_size` and `s2_resize_output_to_scale_idx`.

        The defaults are LLaVA's: its three scales, with the tile size and the grid of the smallest.
        """
        sizes = _read_sizes(_get(args, "s2_scales", DEFAULT_SCALES))
        tile_size = _get(args, "s2_max_split_size", sizes[0])
        output_index = _get(args, "s2_resize_output_to_scale_idx", 0)
        if type(tile_size) is not int or tile_size < 1:
            raise ConfigError(f"s2_max_split_size={tile_size!r} is not a size in pixels; expected e.g. {sizes[0]}.")
        if type(output_index) is not int:
            raise ConfigError(f"s2_resize_output_to_scale_idx={output_index!r} is not an index; expected e.g. 0.")
        return cls(sizes=sizes, tile_size=tile_size, output_index=output_index)

    @property
    def num_tiles(self) -> int:
        """K: the tiles per image, over all scales."""
        return sum((size // self.tile_size) ** 2 for size in self.sizes)

    def tiles(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Cut images (B, 3, H, H) into K batches (B, 3, S, S): scale by scale, row by row, from left to right."""
        for size in self.sizes:
            resized = images
            if images.shape[-1] != size:
                resized = functional.interpolate(images.float(), size=size, mode="bicubic").to(images.dtype)
            for row in resized.split(self.tile_size, dim=2):
                yield from row.split(self.tile_size, dim=3)

    def count_patches(self, side: int) -> int:
        """Return M, the patches per image after `merge`, if a tile has ``side`` patches along its side."""
        return (self.sizes[self.output_index] // self.tile_size * side) ** 2

    def merge(self, features: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
        """Merge the features of all tiles, in the order of `tiles`: (K * B, P + N, D) -> (B, P + M, D * scales).

        Prefix tokens are averaged over the tiles of a scale, then concatenated over the scales as the patches are.
        """
        splits = [size // self.tile_size for size in self.sizes]
        batch = len(features) // self.num_tiles
        side = round((features.shape[1] - num_prefix_tokens) ** 0.5)
        parts = features.split([n * n * batch for n in splits])
        grids = [_grid(part[:, num_prefix_tokens:], n, side) for n, part in zip(splits, parts, strict=True)]
        patches = torch.cat([_resize(grid, splits[self.output_index] * side) for grid in grids], dim=-1)
        if not num_prefix_tokens:
            return patches
        means = [part[:, :num_prefix_tokens].unflatten(0, (-1, batch)).mean(dim=0) for part in parts]  # (B, P, D) each
        return torch.cat([torch.cat(means, dim=-1), patches], dim=1)


class ScaledImages(Images):
    """Packs square images (3, H, H) of any H, each read at all scales."""

    def __init__(self, manifest: Manifest, scales: Scales) -> None:
        super().__init__(manifest)
        self._scales = scales

    def _batch(self, images: Sequence[torch.Tensor], runner: Runner) -> tuple[list[int], torch.Tensor]:
        """Return how many tiles each image (..., 3, H, H) makes, and the batch of all tiles."""
        stacks = [image.to(runner.device).reshape(-1, *image.shape[-3:]) for image in images]
        counts = [len(stack) * self._scales.num_tiles for stack in stacks]
        tiles = (tile for stack in stacks for tile in self._scales.tiles(stack))
        return counts, self._copy(tiles, sum(counts), runner)

    def _merge(self, features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Merge tiles in the dtype of their images, as s2wrapper does: (K * B, P + N, D) -> (B, P + M, D * scales)."""
        return self._scales.merge(features.to(dtype), features.shape[1] - self.spec.num_patches)

    def feature_row(self, pick: Pick) -> tuple[int, ...]:
        """Return (P + M, D), the shape of one image's features, over all scales."""
        patches = self._scales.count_patches(self.spec.num_patches_per_side)
        return pick.num_tokens - self.spec.num_patches + patches, pick.hidden_size * len(self._scales.sizes)

    def _fits(self, shape: torch.Size) -> bool:
        return shape[0] == 3 and shape[1] == shape[2]

    def _expectation(self, *, in_list: bool) -> str:
        return f"square images {'(3, H, H)' if in_list else '(B, 3, H, H)'} of any H"


def _grid(tiles: torch.Tensor, n: int, side: int) -> torch.Tensor:
    """Arrange the patches of n x n tiles as in the image: (n * n * B, N, D) -> (B, D, n * p, n * p)."""
    grid: torch.Tensor = tiles.unflatten(1, (side, side)).unflatten(0, (n, n, -1))  # (n, n, B, p, p, D)
    return grid.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)


def _resize(grid: torch.Tensor, side: int) -> torch.Tensor:
    """Average a grid of features over areas, unless it has this side already: (B, D, h, h) -> (B, side * side, D)."""
    if grid.shape[-1] != side:
        grid = functional.interpolate(grid.float(), size=side, mode="area").to(grid.dtype)
    return grid.flatten(2).transpose(1, 2)


def _get(args: Any, name: str, default: Any) -> Any:
    value = getattr(args, name, None)
    return default if value is None else value


def _read_sizes(scales: Any) -> tuple[int, ...]:
    """Read "336,672,1008" or a list of numbers, in ascending order."""
    parts = scales.split(",") if isinstance(scales, str) else scales
    try:
        sizes = sorted(int(part) if isinstance(part, str) else part for part in parts)
    except (TypeError, ValueError):
        sizes = []
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(
            f"s2_scales={scales!r} is not a list of sizes in pixels; expected {DEFAULT_SCALES!r}, or a list of numbers."
        )
    return tuple(sizes)
