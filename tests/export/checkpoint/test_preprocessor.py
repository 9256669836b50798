"""Whatever a checkpoint's image processor makes, the bundle's makes S x S pixels, and the change is reported."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from trtower.errors import CheckpointError, ConfigError
from trtower.tower.image_processor import ImageProcessor
from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trtower_export.checkpoint.preprocessor import fit_preprocessor, image_aspect_ratio
from trtower_export.console import LoggedProgress

SIZE = 56
COLOURS = {"resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}


def prepared(written: dict[str, Any]) -> Checkpoint:
    checkpoint = open_checkpoint("dinov2-small", random_weights=True)
    return replace(checkpoint, layout=replace(checkpoint.layout, preprocessor=written))


def fit(written: dict[str, Any]) -> dict[str, Any]:
    return fit_preprocessor(prepared(written), SIZE, LoggedProgress())


def pixels(config: dict[str, Any], width: int = 120, height: int = 80) -> torch.Tensor:
    picture = Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    pixel_values: torch.Tensor = ImageProcessor(config).preprocess(picture, return_tensors="pt")["pixel_values"]
    return pixel_values


SQUARE = {"height": SIZE, "width": SIZE}
SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"size": {"height": 40, "width": 70}, "do_center_crop": False}, "40 x 70 pixels"),
    ({"size": [40, 70], "do_center_crop": False}, "40 x 70 pixels"),
    ({"size": {"shortest_edge": SIZE}, "do_center_crop": False}, f"shortest side is {SIZE}"),
    ({"size": SIZE, "do_center_crop": False}, f"shortest side is {SIZE}"),
    ({"size": {"shortest_edge": 40, "longest_edge": 90}}, "within"),
    ({"size": {"longest_edge": 90}, "do_center_crop": False}, "within"),
    ({"size": {"max_height": 90, "max_width": 60}}, "within"),
    ({"size": {"shortest_edge": 60}, "crop_size": {"height": 40, "width": SIZE}}, f"40 x {SIZE} pixels"),
    ({"size": {"shortest_edge": 60}, "crop_size": [40, SIZE]}, f"40 x {SIZE} pixels"),
    ({"do_resize": False, "do_center_crop": False}, "do_resize is false"),
    ({"do_resize": False, "crop_size": 40}, "40 x 40 pixels"),
    ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 40, "width": 70}}, "40 x 70 pixels"),
    ({"image_processor_type": "SiglipImageProcessor", "size": 40}, "40"),
    ({"image_processor_type": "SiglipImageProcessor", "do_resize": False}, "do_resize is false"),
]


@pytest.mark.parametrize(("written", "prepares"), SHAPES)
def test_every_form_of_size_is_fitted_to_a_square_and_reported(
    written: dict[str, Any], prepares: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fitted = fit(written | COLOURS)
    assert prepares in caplog.text
    assert "rewritten for the engine's 56 x 56 pixels" in caplog.text
    assert pixels(fitted).shape == pixels(fitted, 30, 200).shape == (1, 3, SIZE, SIZE)


def test_crop_without_resizing_is_kept_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    written = {"do_resize": False, "crop_size": SIZE, **COLOURS}
    with caplog.at_level("INFO"):
        assert fit(written) == written
    assert "do_resize is false: only the middle 56 x 56 pixels of each picture are read" in caplog.text
    assert pixels(written).shape == (1, 3, SIZE, SIZE)


def test_null_sides_are_ignored() -> None:
    nothing = dict.fromkeys(("shortest_edge", "longest_edge", "max_height", "max_width"))
    written = {"size": SQUARE | nothing, "crop_size": SQUARE | nothing, **COLOURS}
    assert fit(written) == {"size": SQUARE, "crop_size": SQUARE, **COLOURS}


def test_cropped_square_stays_a_square_when_it_is_scaled() -> None:
    written = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 28, "width": 28}, **COLOURS}
    assert fit(written) == {**written, "do_resize": True, "size": {"height": 80, "width": 80}, "crop_size": SQUARE}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", "x"),
        ("size", {}),
        ("size", {"edge": 3}),
        ("size", 0),
        ("crop_size", {"shortest_edge": 3}),
        ("crop_size", -1),
    ],
)
def test_invalid_size_names_the_file_and_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json of facebook/dinov2-small: {key}="):
        fit({key: value, **COLOURS})


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
@pytest.mark.parametrize("count", [2, 4])
def test_colours_with_another_number_of_channels_are_refused(key: str, count: int) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.* has {count} numbers; expected 3"):
        fit({**COLOURS, key: [0.5] * count})


@pytest.mark.parametrize("channels", [1, 4, 0, "3", None])
@pytest.mark.parametrize("family", ["clip", "dinov2", "siglip", "internvl_vision-normed", "eva_clip"])
def test_tower_with_another_number_of_channels_is_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, channels: Any
) -> None:
    folder = Path(shutil.copytree(checkpoints[family], tmp_path / "c"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_channels": channels}))
    with pytest.raises(CheckpointError, match="num_channels"):
        open_checkpoint(str(folder))


UNKNOWN = ["DeepseekVLImageProcessor", "Lfm2VlImageProcessorFast", "ViTImageProcessor", "SomebodysImageProcessor"]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_processor_makes_one_tile_if_its_settings_are_written(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    written = {"image_processor_type": kind, "size": {"height": 40, "width": 40}, "min_size": 14, **COLOURS}
    with caplog.at_level("INFO"):
        fitted = fit(written)
    assert "tiling and padding remain up to you" in caplog.text
    assert pixels(fitted).shape == (1, 3, SIZE, SIZE)
    assert fitted["image_mean"] == COLOURS["image_mean"]


def test_unknown_processor_that_crops_keeps_its_crop() -> None:
    crops = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}}
    fitted = fit({"image_processor_type": "VideoLlavaImageProcessor", **crops, **COLOURS})
    assert (fitted["size"], fitted["crop_size"]) == ({"shortest_edge": 80}, SQUARE)


def test_unknown_processor_makes_the_pixels_that_transformers_makes() -> None:
    theirs = (getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor)(size=SQUARE)
    picture = Image.effect_mandelbrot((120, 80), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    expected = theirs(picture, return_tensors="pt")["pixel_values"]
    fitted = fit({**theirs.to_dict(), "image_processor_type": "ViTImageProcessor"})
    assert torch.equal(pixels(fitted), expected)


def test_error_for_an_unknown_processor_names_the_settings_to_write() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown image_processor_type 'ViTImageProcessor'.*write size, resample, image_std into"
    ):
        fit({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.5]})


def test_processor_that_changes_colours_is_refused() -> None:
    written = {"image_processor_type": "MobileViTImageProcessor", "size": 40, "do_flip_channel_order": True, **COLOURS}
    with pytest.raises(ConfigError, match="do_flip_channel_order=True"):
        fit(written)


@pytest.mark.parametrize(
    ("written", "ratio"),
    [
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "pad"),
        ({"image_processor_type": "LlavaImageProcessorFast", "do_pad": False}, None),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "anyres"),
        ({"image_processor_type": "LlavaOnevisionImageProcessorFast", "do_pad": True}, "anyres"),
        ({"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True}, "anyres"),
        ({"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False}, None),
        ({"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": True, "do_pad": True}, "anyres"),
        ({"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": False, "do_pad": True}, None),
        ({"image_processor_type": "SmolVLMImageProcessorFast"}, "anyres"),
        ({"image_processor_type": "DeepseekVLImageProcessor"}, "pad"),
        ({"image_processor_type": "CLIPImageProcessor"}, None),
    ],
)
def test_padding_and_tiling_are_read_from_the_processor(written: dict[str, Any], ratio: str | None) -> None:
    assert image_aspect_ratio(prepared(written)) == ratio
