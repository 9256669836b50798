"""LLaVA's vision towers by their names and signatures: one scale, S2, and NVILA's dynamic S2.

Sources: `clip_encoder.py` and `builder.py` of LLaVA and LLaVA-NeXT, `vision_encoder.py` of VILA, whose attributes they
have. Shapes: B images, H pixels a side, K tiles of an image, M patches of it, D features a token (see s2.py).
"""

import logging
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from typing_extensions import Self, Unpack

from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import export_command, name_layers
from trtower.errors import ConfigError
from trtower.layer_codes import LayerCode
from trtower.reading import says_trained
from trtower.tower.options import TowerKeywords, TowerOptions, takes_options
from trtower.tower.pick import whole_code
from trtower.tower.s2 import ScaledImages, Scales
from trtower.tower.vision_tower import VisionTower

logger = logging.getLogger(__name__)

VILA_LAYER = -2
"""VILA's default, where its config says no `mm_vision_select_layer`."""


class CLIPVisionTower(VisionTower):
    """LLaVA's class, with its signature and semantics; ``vision_tower`` is the path of a bundle.

    ``args`` is the model's config: `mm_vision_select_layer` and `mm_vision_select_feature`, by default "patch", name
    what is read of what the bundle holds. LLaVA-NeXT passes the same as `vision_tower_cfg`. VILA's config may leave
    out the layer, which is -2 then. `load` needs no config and reads what the bundle holds.
    """

    @takes_options
    def __init__(
        self,
        vision_tower: str | os.PathLike[str],
        args: Any = None,
        delay_load: bool = False,
        *,
        vision_tower_cfg: Any = None,
        **options: Unpack[TowerKeywords],
    ) -> None:
        args = vision_tower_cfg if args is None else args
        super().__init__(vision_tower, **vars(TowerOptions(**options)))  # the layer is the config's to say
        layer = getattr(args, "mm_vision_select_layer", VILA_LAYER if _is_vila(args) else None)
        if layer is None:
            raise ConfigError(
                f"{_describe(args)} has no mm_vision_select_layer. Without a LLaVA config: "
                f"trtower.{type(self).__name__}.load(…)."
            )
        asked = _class_for(args)
        if not isinstance(self, asked):
            raise ConfigError(
                f"s2 or dynamic_s2 of the config asks for several scales; {type(self).__name__} does not read them so: "
                f"take trtower.{asked.__name__}, or trtower.build_vision_tower, which chooses."
            )
        self.select(layer, getattr(args, "mm_vision_select_feature", None) or "patch")
        if _is_vila(args):
            self._refuse_dropped_patch()
        self._warn_of_trained_weights(args)
        self._configure(args)
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    @classmethod
    def _make(
        cls,
        bundle: str | os.PathLike[str],
        select_layer: LayerCode | None,
        select_feature: str | None,
        **options: Unpack[TowerKeywords],
    ) -> Self:
        spec = Bundle.open(bundle).manifest.spec
        args = SimpleNamespace(
            mm_vision_select_layer=whole_code(spec) if select_layer is None else select_layer,
            mm_vision_select_feature=spec.select_feature if select_feature is None else select_feature,
        )
        return cls(bundle, args, delay_load=True, **options)

    def _refuse_dropped_patch(self) -> None:
        """Ask what VILA's "patch" shall mean for a tower whose first token is not a CLS token.

        VILA drops the first token of every tower; LLaVA-NeXT, which reads the same code, keeps all of a SigLIP's.
        """
        if self.select_feature == "patch" and self.spec.num_prefix_tokens != 1:
            raise ConfigError(
                f"mm_vision_select_feature='patch' drops the first token in VILA; a {self.spec.family} tower has "
                f"{self.spec.num_prefix_tokens} tokens before its patches. Set config.mm_vision_select_feature to "
                "'cls_patch', which keeps every token."
            )

    def _warn_of_trained_weights(self, args: Any) -> None:
        """Say that a checkpoint holds trained weights of its tower, which this bundle was not made of.

        LLaVA's loader drops them in silence where a tower was built that takes no weights.
        """
        trained, own = says_trained(lambda key: getattr(args, key, None)), getattr(args, "_name_or_path", None)
        source = self.bundle.manifest.source.checkpoint
        if trained and own and own != source and Path(str(own)).resolve() != Path(source).resolve():
            logger.warning(
                "%s says that its tower was trained (%s), and %s was made of %s, whose weights may be others: "
                "trtower export %s", own, trained, self.bundle.path, source, shlex.quote(str(own)),
            )  # fmt: skip

    def _configure(self, args: Any) -> None:
        """Read what else a config says, before anything is loaded."""


class _ScaledTower(CLIPVisionTower):
    """What the towers of several scales have in common: the scales, and the width of their features."""

    _scales: Scales
    _pictured: int  # which of the scales the image processor makes pictures of

    def _configure(self, args: Any) -> None:
        self._scales = Scales.from_config(args)
        if self._scales.tile_size != self.spec.image_size:
            layers = name_layers(self.spec, self._pick.layers)
            command = export_command(self.bundle, layers, self._scales.tile_size)
            raise ConfigError(
                f"the scales {self.scales} are read in tiles of {self._scales.tile_size} pixels; {self.bundle.path} "
                f"takes {self.spec.image_size}. Export it with that --image-size: {command}"
            )
        processor, side = self.image_processor, self.scales[self._pictured]
        processor.size, processor.crop_size = processor.size.resized(side), processor.crop_size.resized(side)

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


class CLIPVisionTowerS2(_ScaledTower):
    """LLaVA's and VILA's multi-scale tower: every image at each of `scales`, in tiles of the engine's size.

    Images are (B, 3, H, H) of any H, and `image_processor` makes them of the largest scale. The tiles of all images and
    scales run together. `num_patches` stays that of one tile, as in the eager towers.
    """

    _pictured = -1

    def _configure(self, args: Any) -> None:
        super()._configure(args)
        self._images = ScaledImages(self.bundle.manifest, self._scales)

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


class CLIPVisionTowerDynamicS2(_ScaledTower):
    """NVILA's tower for `dynamic_s2`: the model cuts the tiles and merges what they become.

    So `forward` is the plain one, and only `hidden_size` is that of all scales, which the model concatenates.
    """

    _pictured = 0


def build_vision_tower(
    vision_tower_cfg: Any, config: Any = None, *, bundle: str | os.PathLike[str] | None = None, **kwargs: Any
) -> CLIPVisionTower | None:
    """Build the tower of a model, as the function of this name does in LLaVA, LLaVA-NeXT and VILA.

    Args:
        vision_tower_cfg: The model's config, whose `mm_vision_tower` or `vision_tower` is the path of a bundle. VILA
            passes the path itself, or None where the model has no tower.
        config: The model's config, where a path comes first, as in VILA. Its `mm_hidden_size` is set.
        bundle: The path of a bundle, instead of what the config names: `functools.partial(build_vision_tower,
            bundle=…)` in the place of LLaVA's function leaves a checkpoint's config as it is.
        **kwargs: Passed on to the class, such as `delay_load`.

    Returns:
        A `CLIPVisionTower`, or for `s2` and `dynamic_s2` of the config the class that reads several scales; None where
        VILA passes no path.

    Raises:
        ConfigError: No bundle is named, or it does not hold what the config reads.
        BundleError: The path is not a bundle.
    """
    if config is not None or vision_tower_cfg is None:
        path, args = vision_tower_cfg, config
        if path is None and bundle is None:
            return None
    else:
        args = vision_tower_cfg
        path = getattr(args, "mm_vision_tower", None) or getattr(args, "vision_tower", None)
    path = path if bundle is None else bundle
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"{_describe(args)} has neither mm_vision_tower nor vision_tower: set one to a bundle's path, or pass "
            "bundle=…"
        )
    tower = _class_for(args)(path, args=args, **kwargs)
    if config is not None:
        config.mm_hidden_size = tower.hidden_size
    return tower


def _describe(args: Any) -> str:
    """Call a config what it is; one that is a dict or a path has no attributes to be read."""
    if isinstance(args, dict):
        return "the config is a dict (pass types.SimpleNamespace(**config)), and as such"
    return f"the config {args!r}" if isinstance(args, str | os.PathLike | None) else "the config"


def _is_vila(args: Any) -> bool:
    """Whether a config is VILA's, which keeps the tower's own under this name."""
    return hasattr(args, "vision_tower_cfg")


def _class_for(args: Any) -> type[CLIPVisionTower]:
    if getattr(args, "s2", False):
        return CLIPVisionTowerS2
    return CLIPVisionTowerDynamicS2 if getattr(args, "dynamic_s2", False) else CLIPVisionTower
