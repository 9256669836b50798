"""Make a checkpoint's image preprocessing produce exactly the pixels that its engine accepts."""

from typing import Any

from trtower.errors import CheckpointError, ConfigError
from trtower.spec import NHWC, TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.console import Progress

ONE_TILE = {
    "LlavaImageProcessor": "CLIPImageProcessor",
    "LlavaNextImageProcessor": "SiglipImageProcessor",
    "LlavaOnevisionImageProcessor": "SiglipImageProcessor",
    "AyaVisionImageProcessor": "SiglipImageProcessor",
    "BlipImageProcessor": "SiglipImageProcessor",
    "Cohere2VisionImageProcessor": "SiglipImageProcessor",
    "DINOv3ViTImageProcessor": "SiglipImageProcessor",
    "Gemma3ImageProcessor": "SiglipImageProcessor",
    "GotOcr2ImageProcessor": "SiglipImageProcessor",
    "Idefics3ImageProcessor": "SiglipImageProcessor",
    "Siglip2ImageProcessor": "SiglipImageProcessor",
    "SmolVLMImageProcessor": "SiglipImageProcessor",
}
"""Processors that tile, pad or patch pictures, and the plain one that makes a single tile of a whole picture."""

AS_IT_IS = ("CLIPImageProcessor", "BitImageProcessor", "SiglipImageProcessor", "ResizeWithPadImageProcessor")
"""Processors that runtime/trtower/tower/image_processor.py implements."""

PIXELS = {"do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale"}
PIXELS |= {"rescale_factor", "do_normalize", "image_mean", "image_std"}
"""The settings that concern one tile."""

OTHER_PIXELS = ("do_flip_channel_order", "do_grayscale", "offset", "rescale_offset", "do_invert", "do_color_quantize")
"""Settings with which a processor changes the colours of a tile."""

TILES = ("image_grid_pinpoints", "crop_to_patches", "do_pan_and_scan", "do_image_splitting")
"""Settings with which a processor cuts a picture into tiles."""

BY_DEFAULT = {
    "LlavaNextImageProcessor": "anyres",
    "LlavaNextVideoImageProcessor": "anyres",
    "LlavaOnevisionImageProcessor": "anyres",
    "Cohere2VisionImageProcessor": "anyres",
    "Idefics3ImageProcessor": "anyres",
    "SmolVLMImageProcessor": "anyres",
    "Lfm2VlImageProcessor": "anyres",
    "DeepseekVLImageProcessor": "pad",
    "JanusImageProcessor": "pad",
}
"""Whether a processor tiles or pads, for those that do not write it into their files."""

BOUNDS = [{"shortest_edge", "longest_edge"}, {"longest_edge"}, {"max_height", "max_width"}]
"""Forms of `size` with which the result keeps the picture's shape."""


def image_aspect_ratio(checkpoint: Checkpoint) -> str | None:
    """Return how the model's own code pads or tiles pictures: LLaVA's `image_aspect_ratio`, else "anyres" or "pad".

    None if it does neither, like the bundle's image processor.
    """
    written = checkpoint.layout.preprocessor or {}
    if checkpoint.layout.image_aspect_ratio is not None:
        return checkpoint.layout.image_aspect_ratio
    if any(written.get(name) for name in TILES):
        return "anyres"
    usual = BY_DEFAULT.get(_kind(written))
    if usual == "anyres" and any(written.get(name) is False for name in TILES):
        return None
    pads = written.get("do_pad")
    if usual == "anyres" or pads is None:
        return usual
    return "pad" if pads else None


def fit_preprocessor(checkpoint: Checkpoint, size: int, progress: Progress) -> dict[str, Any]:
    """Return the preprocessor_config.json of a bundle for S pixels.

    DINOv2 is trained at 518 pixels but its checkpoints prepare images at 224, and eager code interpolates the position
    embeddings. An engine is fixed at one size S, so the config is scaled to S x S; its crop keeps the same share of the
    image. Changes and assumptions are reported.

    Raises ConfigError if the checkpoint's preprocessing cannot be turned into one that makes such pixels, or if an
    unknown processor leaves a setting to its defaults, and CheckpointError if one of `ONE_TILE` does.
    """
    written, family = checkpoint.layout.preprocessor, checkpoint.family
    if written is None:
        written = family.preprocessor
        progress.say(
            f"the checkpoint has no preprocessor_config.json: preparing images as {family.name} models usually do"
        )
    try:
        fitted, prepares = _fit(_one_tile(written, size, progress), size)
        _check_colours(ImageProcessor(fitted))
    except ConfigError as err:
        raise ConfigError(f"preprocessor_config.json of {checkpoint.source}: {err}") from err
    if prepares and checkpoint.layout.preprocessor is not None:
        progress.say(f"the checkpoint prepares {prepares}: rewritten for the engine's {size} x {size} pixels")
    if not fitted.get("do_resize", True):
        progress.say(f"do_resize is false: only the middle {size} x {size} pixels of each picture are read, unscaled")
    return fitted


def stop_at_pixels(fitted: dict[str, Any], spec: TowerSpec) -> dict[str, Any]:
    """Return the config of a bundle's processor: it prepares floats, or stops at the bytes that the engine takes.

    What the engine then does itself stays in the config: its rescale_factor, image_mean and image_std.
    """
    if spec.takes_floats:
        return fitted
    processor = ImageProcessor(fitted)
    config = fitted | {"do_rescale": False, "do_normalize": False, "rescale_factor": processor.rescale_factor}
    config |= {"image_mean": processor.image_mean, "image_std": processor.image_std}
    config |= {} if processor.do_rescale else {"rescale_factor": 1.0}
    config |= {} if processor.do_normalize else {"image_mean": 0.0, "image_std": 1.0}
    return config | ({"data_format": "channels_last"} if spec.layout == NHWC else {})


def _fit(written: dict[str, Any], size: int) -> tuple[dict[str, Any], str | None]:
    """Return a config that makes S x S pixels of any picture, and what the written config makes if that differs."""
    square = {"height": size, "width": size}
    for name in ("size", "crop_size"):
        if isinstance(sides := written.get(name), dict) and None in sides.values():
            written = {**written, name: {side: value for side, value in sides.items() if value is not None}}
    squashed = {**written, "do_resize": True, "size": square}
    squashed |= {"crop_size": square} if written.get("crop_size") else {}
    sides = written.get("size")
    if isinstance(sides, dict) and sides.keys() in BOUNDS:
        return {**squashed, "do_center_crop": False}, f"pixels within {sides}"
    processor = ImageProcessor(written)
    crop, resized = processor.crop_size, processor.size
    if not processor.do_center_crop:
        if processor.do_resize and resized == square:
            return written, None
        return squashed, _named(resized) if processor.do_resize else "pictures in their own size (do_resize is false)"
    if crop == square:
        return written, None
    if crop["height"] != crop["width"] or not processor.do_resize:
        return {**squashed, "do_center_crop": False}, _named(crop)
    scaled = {name: round(side * size / crop["height"]) for name, side in resized.items()}
    return {**squashed, "size": scaled, "crop_size": square}, _named(crop)


def _named(sides: dict[str, int]) -> str:
    if "shortest_edge" in sides:
        return f"pixels whose shortest side is {sides['shortest_edge']}"
    return f"{sides['height']} x {sides['width']} pixels"


def _check_colours(processor: ImageProcessor) -> None:
    """Raise ConfigError if the colours do not fit the 3 channels that an engine accepts."""
    for name in ("image_mean", "image_std"):
        numbers = getattr(processor, name)
        if isinstance(numbers, list | tuple) and len(numbers) not in (1, 3):
            raise ConfigError(f"{name}={numbers!r} has {len(numbers)} numbers; expected 3, or one for all channels.")


def _kind(written: dict[str, Any]) -> str:
    kind = str(written.get("image_processor_type") or written.get("feature_extractor_type") or AS_IT_IS[0])
    return kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def _one_tile(written: dict[str, Any], size: int, progress: Progress) -> dict[str, Any]:
    """Reduce a processor that tiles, pads or patches pictures to what it does to one tile."""
    kind = _kind(written)
    if kind in AS_IT_IS:
        return written
    tile = {name: value for name, value in written.items() if name in PIXELS}
    _refuse_unknown_defaults(kind, tile)
    if other := next((name for name in OTHER_PIXELS if written.get(name)), None):
        raise ConfigError(f"{other}={written[other]!r} of {kind} changes colours, which no image processor here does.")
    crops = written.get("do_center_crop") and written.get("crop_size")
    tile["image_processor_type"] = ONE_TILE.get(kind, "CLIPImageProcessor" if crops else "SiglipImageProcessor")
    if tile["image_processor_type"] == "SiglipImageProcessor":
        tile |= {"do_center_crop": False, "crop_size": None, "size": {"height": size, "width": size}}
    progress.say(
        f"{kind}: the bundle's image_processor makes one {size} x {size} tile; tiling and padding remain up to you"
    )
    return tile


def _refuse_unknown_defaults(kind: str, tile: dict[str, Any]) -> None:
    """Raise an error naming the settings that a processor leaves to defaults that are unknown here."""
    known = kind in ONE_TILE
    needed = ("resample", "image_mean", "image_std") if known else ("size", "resample", "image_mean", "image_std")
    absent = [name for name in needed if tile.get(name) is None]
    if absent and known:
        raise CheckpointError(
            f"preprocessor_config.json leaves {', '.join(absent)} to the defaults of {kind}: in a copy, write them "
            "into the file, with the values that transformers uses."
        )
    if absent:
        raise ConfigError(
            f"unknown image_processor_type {kind!r}, with settings left to its defaults: in a copy, write "
            f"{', '.join(absent)} into preprocessor_config.json, with the values that transformers uses."
        )
