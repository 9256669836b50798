"""LLaVA's vision towers by their names and signatures: one scale, S2, and NVILA's dynamic S2.

Sources: `clip_encoder.py` and `builder.py` of LLaVA and LLaVA-NeXT, `vision_encoder.py` of VILA, whose attributes they
have. Shapes: B images, H pixels a side, K tiles of an image, M patches of it, D features a token (see s2.py).
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from trtower.errors import ConfigError
from trtower.pick import export_command, name_layers
from trtower.runners import Runner
from trtower.runners.tensorrt import EngineOptions
from trtower.s2 import Scales
from trtower.tower import VisionTower


class CLIPVisionTower(VisionTower):
    """LLaVA's class, with its signature and semantics; ``vision_tower`` is the path of a bundle.

    ``args`` is the model's config: `mm_vision_select_layer` and `mm_vision_select_feature`, by default "patch", name
    what is read of what the bundle holds. LLaVA-NeXT passes the same as `vision_tower_cfg`.
    """

    def __init__(
        self,
        vision_tower: str | os.PathLike[str],
        args: Any = None,
        delay_load: bool = False,
        *,
        vision_tower_cfg: Any = None,
        backend: str = "auto",
        device: str | torch.device | None = None,
        check_finite: bool | None = None,
        count_cls: bool = False,
        require_certificate: bool = False,
        engine: EngineOptions | None = None,
    ) -> None:
        args = vision_tower_cfg if args is None else args
        if not hasattr(args, "mm_vision_select_layer"):
            raise ConfigError(
                "args has no mm_vision_select_layer. Without a LLaVA config: trtower.VisionTower.load(…)."
            )
        asked = _class_for(args)
        if not isinstance(self, asked):
            raise ConfigError(
                f"s2 or dynamic_s2 of the config asks for several scales; {type(self).__name__} does not read them so: "
                f"take trtower.{asked.__name__}, or trtower.build_vision_tower, which chooses."
            )
        super().__init__(
            vision_tower,
            backend=backend,
            device=device,
            check_finite=check_finite,
            count_cls=count_cls,
            require_certificate=require_certificate,
            engine=engine,
        )
        self.select(args.mm_vision_select_layer, getattr(args, "mm_vision_select_feature", "patch"))
        self._configure(args)
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    def _configure(self, args: Any) -> None:
        """Read what else a config says, before anything is loaded."""


class _ScaledTower(CLIPVisionTower):
    """What the towers of several scales have in common: the scales, and the width of their features."""

    _scales: Scales

    def _configure(self, args: Any) -> None:
        self._scales = Scales.from_config(args)
        if self._scales.tile_size != self.spec.image_size:
            layers = name_layers(self.spec, self._pick.layers)
            command = export_command(self.bundle, layers, self._scales.tile_size)
            raise ConfigError(
                f"the scales {self.scales} are read in tiles of {self._scales.tile_size} pixels; {self.bundle.path} "
                f"takes {self.spec.image_size}. Export it with that --image-size: {command}"
            )

    @property
    def scales(self) -> list[int]:
        """The sizes at which an image is read, in ascending order."""
        return list(self._scales.sizes)

    @property
    def max_split_size(self) -> int:
        """S: the pixels of a tile's side."""
        return self._scales.tile_size

    @property
    def resize_output_to_scale_idx(self) -> int:
        """The scale whose grid the features are brought to, by its place among `scales`."""
        return self._scales.output_index

    @property
    def hidden_size(self) -> int:
        """D: the picked layers, once a scale."""
        return super().hidden_size * len(self._scales.sizes)

    def _enlarge(self, size: int) -> None:
        """Have the image processor make images of this size, whichever way it was told the size before."""
        self.image_processor.size = dict.fromkeys(self.image_processor.size, size)
        self.image_processor.crop_size = {"height": size, "width": size}


class CLIPVisionTowerS2(_ScaledTower):
    """LLaVA's and VILA's multi-scale tower: every image at each of `scales`, in tiles of the engine's size.

    Images are (B, 3, H, H) of any H, and `image_processor` makes them of the largest scale. The tiles of all images and
    scales run together. `num_patches` stays that of one tile, as in the eager towers.
    """

    def _configure(self, args: Any) -> None:
        super()._configure(args)
        self._enlarge(self.s2_image_size)

    @property
    def s2_scales(self) -> list[int]:
        """LLaVA's name for `scales`."""
        return self.scales

    @property
    def s2_split_size(self) -> int:
        """LLaVA's name for `max_split_size`."""
        return self.max_split_size

    @property
    def s2_image_size(self) -> int:
        """The largest scale."""
        return self._scales.sizes[-1]

    def _encode(
        self, runner: Runner, images: Sequence[torch.Tensor], out: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Run images (..., 3, H, H) of one or several ranks at all scales, and give (B, M, D) for the B in each."""
        scales = self._scales
        batches = [image.to(runner.device).reshape(-1, *image.shape[-3:]) for image in images]
        counts = [len(batch) * scales.num_tiles for batch in batches]
        tiles = (tile for batch in batches for tile in scales.tiles(batch))
        features = self._run(runner, self._pack(runner, tiles, sum(counts))).split(counts)  # (K * B, P + N, D) each
        prefix = self.spec.num_prefix_tokens - self._pick.first_token
        return [scales.merge(part.to(batch.dtype), prefix) for part, batch in zip(features, batches, strict=True)]

    @property
    def _tokens_of_an_image(self) -> int:
        prefix = self.spec.num_prefix_tokens - self._pick.first_token
        return prefix + self._scales.count_patches(self.spec.num_patches_per_side)

    def _fits(self, shape: torch.Size) -> bool:
        return shape[0] == 3 and shape[1] == shape[2]

    def _expectation(self, *, in_list: bool) -> str:
        return f"square images {'(3, H, H)' if in_list else '(B, 3, H, H)'} of any H"


class CLIPVisionTowerDynamicS2(_ScaledTower):
    """NVILA's tower for `dynamic_s2`: the model cuts the tiles and merges what they become.

    So `forward` is the plain one, and only `hidden_size` is that of all scales, which the model concatenates.
    """

    def _configure(self, args: Any) -> None:
        super()._configure(args)
        self._enlarge(self.scales[0])


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """Build the tower that a LLaVA config names in `mm_vision_tower` or `vision_tower`, as LLaVA's function does.

    `s2` and `dynamic_s2` of the config choose the class.
    """
    path = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not isinstance(path, str | os.PathLike):
        raise ConfigError("the config has neither mm_vision_tower nor vision_tower: set one to a bundle's path.")
    return _class_for(vision_tower_cfg)(path, args=vision_tower_cfg, **kwargs)


def _class_for(args: Any) -> type[CLIPVisionTower]:
    if getattr(args, "s2", False):
        return CLIPVisionTowerS2
    return CLIPVisionTowerDynamicS2 if getattr(args, "dynamic_s2", False) else CLIPVisionTower
