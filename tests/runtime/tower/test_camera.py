"""Frames of cameras: where black is added, and which values are refused.

`make test-lerobot` compares the pixels with those of LeRobot's and openpi's own code, bit for bit.
"""

from typing import Any

import numpy as np
import pytest
import torch

from trtower.errors import ConfigError, InputError
from trtower.tower.image_processor import ImageProcessor

WHITE = np.full((10, 20, 3), 255, np.uint8)  # twice as wide as high
TALL = np.full((21, 6, 3), 255, np.uint8)


def processor(padding: str = "lerobot", side: int = 12, **others: Any) -> ImageProcessor:
    settings = {"image_processor_type": "ResizeWithPadImageProcessor", "size": {"height": side, "width": side}}
    return ImageProcessor(settings | {"resize_with_pad": padding} | others)


@pytest.mark.parametrize(
    ("padding", "frame", "axis", "kept"),
    [
        ("lerobot", WHITE, 1, range(3, 9)),
        ("smolvla", WHITE, 1, range(6, 12)),
        ("openpi", WHITE, 1, range(3, 9)),
        ("openpi_pytorch", WHITE, 1, range(3, 9)),
        ("lerobot", TALL, 2, range(4, 7)),  # 3 of 12 columns: the odd black one is on the right
        ("smolvla", TALL, 2, range(9, 12)),
        ("openpi", TALL, 2, range(4, 7)),
        ("openpi_pytorch", TALL, 2, range(4, 7)),
    ],
)
def test_frame_keeps_its_shape_and_gets_black_around(padding: str, frame: np.ndarray, axis: int, kept: range) -> None:
    pixels = processor(padding)(frame).pixel_values[0]
    assert pixels.shape == (3, 12, 12)
    lit = [index for index in range(12) if (np.take(pixels, index, axis) == 1).any()]
    dark = [index for index in range(12) if (np.take(pixels, index, axis) == -1).all()]
    assert (lit, dark) == ([*kept], [index for index in range(12) if index not in kept])


def test_pixels_between_are_those_of_a_bilinear_filter_without_antialiasing() -> None:
    stripes = np.zeros((8, 16, 3), np.uint8)
    stripes[:, ::2] = 200  # at a quarter of the width, two neighbours of every four columns are read
    pixels = processor(side=4, image_mean=0.0, image_std=1.0)(stripes).pixel_values[0]
    assert np.allclose(pixels[:, 1:3], 100 / 255)
    assert not pixels[:, [0, 3]].any()


@pytest.mark.parametrize("padding", ["lerobot", "smolvla", "openpi_pytorch"])
def test_type_of_a_frame_says_its_range(padding: str) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    fractions = frame.astype(np.float32) / 255
    expected = processor(padding)(frame, return_tensors="pt").pixel_values
    for form in (fractions, torch.from_numpy(fractions).permute(2, 0, 1), fractions.astype(np.float64)):
        actual = processor(padding)(form, return_tensors="pt").pixel_values
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_square_frames_are_only_scaled() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    for padding in ("lerobot", "smolvla", "openpi", "openpi_pytorch"):
        pixels = processor(padding)(frame).pixel_values[0]
        assert np.array_equal(pixels, (np.moveaxis(frame, -1, 0) / np.float32(255)) * np.float32(2) - np.float32(1))
        as_bytes = processor(padding, do_rescale=False, do_normalize=False)(frame).pixel_values[0]
        assert np.array_equal(as_bytes, np.moveaxis(frame, -1, 0))


@pytest.mark.parametrize("padding", ["lerobot", "smolvla", "openpi", "openpi_pytorch"])
def test_bytes_for_an_engine_are_the_same_pixels_rounded(padding: str) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    as_bytes = processor(padding, do_rescale=False, do_normalize=False)(frame).pixel_values[0]
    floats = processor(padding)(frame).pixel_values[0]
    assert as_bytes.dtype == np.uint8
    assert np.abs((as_bytes / 255 * 2 - 1) - floats).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    ("padding", "frame", "problem"),
    [
        (
            "lerobot",
            np.full((9, 9, 3), 7.0, np.float32),
            r"values of float32 from 7\.0 to 7\.0; expected .* from 0 to 1",
        ),
        ("lerobot", np.full((9, 9, 3), 7, np.int64), "values of int64 from 7 to 7; expected a frame of uint8"),
        ("lerobot", np.full((9, 9, 3), -0.5, np.float32), r"values of float32 from -0\.5 .* or float, from 0 to 1"),
        ("lerobot", np.full((9, 9, 3), np.nan, np.float32), "values of float32 from nan"),
        ("lerobot", np.zeros((9, 9, 4), np.uint8), "4 channels; expected a frame of red, green and blue"),
        ("openpi", np.zeros((9, 9, 1), np.uint8), "1 channels; expected a frame of red, green and blue"),
        ("lerobot", np.zeros((0, 9, 3), np.uint8), r"a frame without pixels, of shape \(3, 0, 9\)"),
        ("openpi", np.zeros((9, 9, 3), np.float32), "openpi resizes frames of uint8"),
        ("smolvla", np.zeros((5, 4000, 3), np.uint8), "4000 x 5 pixels, which leave nothing of the shorter side"),
    ],
)
def test_other_frames_are_refused(padding: str, frame: np.ndarray, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        processor(padding)(frame)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"resize_with_pad": "gr00t"}, "resize_with_pad='gr00t' is invalid; expected None or lerobot, smolvla, openpi"),
        ({"size": {"height": 12, "width": 24}}, r"size=\{'height': 12, 'width': 24\}; .* makes squares"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ImageProcessor({"image_processor_type": "ResizeWithPadImageProcessor", **settings})(WHITE)


def test_frames_are_not_fitted_if_they_are_not_resized() -> None:
    pixels = processor(do_resize=False)(WHITE, return_tensors="pt").pixel_values
    assert torch.equal(pixels, torch.ones(1, 3, 10, 20))


def test_settings_survive_a_file(tmp_path: Any) -> None:
    processor("smolvla").save_pretrained(tmp_path)
    read = ImageProcessor.from_file(tmp_path / "preprocessor_config.json")
    assert read.to_dict() == processor("smolvla").to_dict()
    assert read.resize_with_pad == "smolvla"
    assert "resize_with_pad" not in ImageProcessor({}).to_dict()
