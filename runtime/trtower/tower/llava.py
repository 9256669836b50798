"""LLaVA's vision towers, with its names and signatures: one scale, S2, and NVILA's dynamic S2.

The attributes are those of `clip_encoder.py` and `builder.py` in LLaVA and LLaVA-NeXT, and `vision_encoder.py` in VILA.
Shapes: B images, H pixels per image side, S pixels per tile side, D features per token (see s2.py).
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
"""VILA's default, if its config has no `mm_vision_select_layer`."""


class CLIPVisionTower(VisionTower):
    """LLaVA's class, with its signature and semantics, running a bundle.

    Without a config, use `load`, which reads what the bundle holds.

    Args:
        vision_tower: The path of a bundle.
        args: The model's config. Its `mm_vision_select_layer` and `mm_vision_select_feature` (default: "patch") say
            what to read from the bundle. VILA's config may leave out the layer, which is then -2.
        delay_load: Whether to leave loading to `load_model`. A config with `unfreeze_mm_vision_tower` loads at once.
        vision_tower_cfg: LLaVA-NeXT's name for `args`.
        **options: Options of `VisionTower.load`, such as `backend`.

    Raises:
        ConfigError: If there is no config, it names no layer, it needs another class (`s2`, `dynamic_s2`), or the
            bundle does not hold what it reads.
        BundleError: If the path is not a bundle, or the bundle is damaged or lacks a required certificate.
        BackendError: If no requested backend can run the bundle here.
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
        super().__init__(vision_tower, **vars(TowerOptions(**options)))  # the config chooses the layer
        layer = getattr(args, "mm_vision_select_layer", VILA_LAYER if _is_vila(args) else None)
        if layer is None:
            raise ConfigError(
                f"{_describe(args)} has no mm_vision_select_layer. Without a LLaVA config, use "
                f"trtower.{type(self).__name__}.load(…)."
            )
        self._refuse_for_model(args)
        required = _class_for(args)
        if not isinstance(self, required):
            raise ConfigError(
                f"the config's s2 or dynamic_s2 needs {required.__name__}; this is {type(self).__name__}. Use "
                f"trtower.{required.__name__}, or trtower.build_vision_tower, which chooses the class."
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

    def _refuse_for_model(self, args: Any) -> None:
        """Raise ConfigError for a bundle that the code of a LLaVA or VILA would treat wrongly."""
        if not self.spec.takes_floats and getattr(args, "mm_vision_tower", None):
            raise ConfigError(
                f"{self.bundle.path} takes bytes, but the code of this model prepares floats for its tower: export it "
                "without --pixels uint8."
            )
        if self.spec.head:
            raise ConfigError(
                f"{self.bundle.path} ends with the {self.spec.head.describe()}, but LLaVA's and VILA's code projects "
                "what its tower returns: export it without --head, or use trtower.VisionTower."
            )

    def _refuse_dropped_patch(self) -> None:
        """Refuse VILA's "patch" unless the tower has exactly one token before its patches.

        VILA drops the first token of every tower. LLaVA-NeXT reads the same code, but keeps all tokens of a SigLIP.
        """
        if self.select_feature == "patch" and self.spec.num_prefix_tokens != 1:
            raise ConfigError(
                f"mm_vision_select_feature='patch' drops the first token in VILA; a {self.spec.family} tower has "
                f"{self.spec.num_prefix_tokens} tokens before its patches. Set config.mm_vision_select_feature to "
                "'cls_patch', which keeps every token."
            )

    def _warn_of_trained_weights(self, args: Any) -> None:
        """Warn if the model's checkpoint holds trained weights of its tower that this bundle was not exported from.

        LLaVA's loader drops them silently, because this tower accepts no weights.
        """
        trained, model = says_trained(lambda key: getattr(args, key, None)), getattr(args, "_name_or_path", None)
        source = self.bundle.manifest.source.checkpoint
        if trained and model and model != source and Path(str(model)).resolve() != Path(source).resolve():
            logger.warning(
                "%s says that its tower was trained (%s), but %s was exported from %s, whose weights may differ. "
                "Export the trained ones: trtower export %s",
                model, trained, self.bundle.path, source, shlex.quote(str(model)),
            )  # fmt: skip

    def _configure(self, args: Any) -> None:
        """Read the config's other settings, before anything is loaded."""


class _ScaledTower(CLIPVisionTower):
    """What the towers of several scales share: the scales, and the width of their features."""

    _scales: Scales
    _processor_scale: int  # index of the scale that the image processor resizes to

    def _configure(self, args: Any) -> None:
        if not self.spec.takes_floats:
            raise ConfigError(
                f"{self.bundle.path} takes bytes, but several scales resize prepared floats: export it without "
                "--pixels uint8."
            )
        self._scales = Scales.from_config(args)
        if self._scales.tile_size != self.spec.image_size:
            layers = name_layers(self.spec, self._pick.layers)
            command = export_command(self.bundle, layers, self._scales.tile_size)
            raise ConfigError(
                f"the scales {self.scales} are read in tiles of {self._scales.tile_size} pixels, but "
                f"{self.bundle.path} accepts {self.spec.image_size}. Export it with that --image-size: {command}"
            )
        processor, side = self.image_processor, self.scales[self._processor_scale]
        processor.size, processor.crop_size = processor.size.resized(side), processor.crop_size.resized(side)

    @property
    def scales(self) -> list[int]:
        """The sizes at which an image is read, in ascending order."""
        return list(self._scales.sizes)

    @property
    def max_split_size(self) -> int:
        """S: the pixels per side of a tile."""
        return self._scales.tile_size

    @property
    def resize_output_to_scale_idx(self) -> int:
        """The index in `scales` of the scale whose grid the features are resized to."""
        return self._scales.output_index

    @property
    def hidden_size(self) -> int:
        """D: the width of the picked layers, times the number of scales."""
        return super().hidden_size * len(self._scales.sizes)


class CLIPVisionTowerS2(_ScaledTower):
    """LLaVA's and VILA's multi-scale tower: reads each image at all `scales`, in tiles of the engine's size.

    Images are (B, 3, H, H) of any H; `image_processor` makes them at the largest scale. The tiles of all images and
    scales run together. Features are (B, M, D), or (B, P + M, D) under `cls_patch`, with M patches on the grid of the
    scale `resize_output_to_scale_idx`. `num_patches` stays that of one tile, as in the eager towers.

    The constructor accepts the arguments of `CLIPVisionTower`. The config's `s2_scales` names the scales. Without it,
    and with `load`, they are 336, 672 and 1008.
    """

    _processor_scale = -1

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
    """NVILA's tower for `dynamic_s2`, where the model cuts the tiles and merges their features.

    So `forward` works as in `CLIPVisionTower`. Only `hidden_size` covers all scales, which the model concatenates.

    The constructor accepts the arguments of `CLIPVisionTower`. The config's `s2_scales` names the scales.
    """

    _processor_scale = 0


def build_vision_tower(
    vision_tower_cfg: Any, config: Any = None, *, bundle: str | os.PathLike[str] | None = None, **kwargs: Any
) -> CLIPVisionTower | None:
    """Build a model's vision tower, as the function of this name does in LLaVA, LLaVA-NeXT and VILA.

    Args:
        vision_tower_cfg: The model's config, whose `mm_vision_tower` or `vision_tower` is the path of a bundle. VILA
            passes the path itself, or None if the model has no tower.
        config: The model's config, if the first argument is a path, as in VILA. Its `mm_hidden_size` is set.
        bundle: The path of a bundle, which overrides the config. To leave a checkpoint's config unchanged, replace
            LLaVA's function by `functools.partial(build_vision_tower, bundle=…)`.
        **kwargs: Arguments for the class, such as `delay_load` or `backend`.

    Returns:
        A `CLIPVisionTower`; if the config sets `s2` or `dynamic_s2`, the class for several scales; None if VILA passes
        no path.

    Raises:
        ConfigError: If no bundle is named, or it does not hold what the config reads.
        BundleError: If the path is not a bundle, or the bundle is damaged or lacks a required certificate.
        BackendError: If no requested backend can run the bundle here.
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
            f"{_describe(args)} has neither mm_vision_tower nor vision_tower. Set one to a bundle's path, or pass "
            "bundle=…"
        )
    tower = _class_for(args)(path, args=args, **kwargs)
    if config is not None:
        config.mm_hidden_size = tower.hidden_size
    return tower


def _describe(args: Any) -> str:
    """Describe a config for an error message; a dict or a path has no attributes to read."""
    if isinstance(args, dict):
        return "the config is a dict (pass types.SimpleNamespace(**config)), so it"
    return f"the config {args!r}" if isinstance(args, str | os.PathLike | None) else "the config"


def _is_vila(args: Any) -> bool:
    """Return whether a config is VILA's, which keeps the tower's own config under this name."""
    return hasattr(args, "vision_tower_cfg")


def _class_for(args: Any) -> type[CLIPVisionTower]:
    if getattr(args, "s2", False):
        return CLIPVisionTowerS2
    return CLIPVisionTowerDynamicS2 if getattr(args, "dynamic_s2", False) else CLIPVisionTower
