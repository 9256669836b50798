"""Bytes become, inside the graph, exactly what the image processor would have made of them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export.small_towers import cut
from tests.runtime.tower.test_image_processor import REFERENCES
from trtower.errors import ConfigError
from trtower.spec import LAYOUTS, NHWC
from trtower.tower.image_processor import ImageProcessor
from trtower_export.families import FAMILIES
from trtower_export.graph.pixels import PixelsFromBytes

STOPS: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
SETTINGS: dict[str, dict[str, Any]] = {each.name: each.preprocessor for each in FAMILIES}
SETTINGS |= {
    "one mean": {"image_mean": 0.5, "image_std": 0.25},
    "from -1 to 1": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "of bytes": {"rescale_factor": 1.0, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]},
}


def image(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (3, 42, 42), dtype=np.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_result_is_the_processors_to_the_bit(settings: dict[str, Any], layout: str) -> None:
    plain = {"do_resize": False, "do_center_crop": False}
    processor = ImageProcessor(settings | plain)
    expected = processor(image(), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    pixels = torch.from_numpy(image())[None]
    pixels = pixels.permute(0, 2, 3, 1) if layout == NHWC else pixels
    result = PixelsFromBytes(ImageProcessor(settings | STOPS), layout)(pixels)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_result_is_that_of_transformers_own_processor() -> None:
    picture = Image.fromarray(image().transpose(1, 2, 0))
    processor = REFERENCES["CLIPImageProcessor"](do_resize=False, do_center_crop=False)
    result = PixelsFromBytes(ImageProcessor(STOPS), "nchw")(torch.from_numpy(image())[None])
    assert torch.equal(result, processor(picture, return_tensors="pt")["pixel_values"])


def test_it_stays_in_fp32_when_its_tower_is_cast() -> None:
    module = torch.nn.Sequential(PixelsFromBytes(ImageProcessor(STOPS), "nchw"), torch.nn.Linear(2, 2)).half()
    pixels: Any = module[0]
    assert pixels.mean.dtype == pixels.std.dtype == torch.float32
    assert module[1].weight.dtype == torch.float16


def test_factor_that_no_graph_repeats_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rescale_factor=0\.0039 cannot be repeated exactly in the graph, as 1/255"):
        PixelsFromBytes(ImageProcessor(STOPS | {"rescale_factor": 0.0039}), "nchw")


def test_tower_accepts_both_kinds() -> None:
    tower, _ = cut("clip")
    floats = ImageProcessor({"do_resize": False, "do_center_crop": False})
    prepared = floats(image(), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    try:
        tower.pixels = PixelsFromBytes(ImageProcessor(STOPS), "nchw")
        with torch.no_grad():
            assert torch.equal(tower(torch.from_numpy(image())[None]), tower(prepared))
    finally:
        tower.pixels = None  # it is shared
