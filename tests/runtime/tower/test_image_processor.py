"""The pixels are those of transformers' PIL processors, to the bit."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from trtower.errors import ConfigError, InputError
from trtower.tower.image_processor import ImageProcessor

pytest.importorskip("transformers")


def reference_class(model: str, name: str) -> Any:
    """Find the PIL processor: transformers 5 has it in a separate module, 4.57 under the plain name."""
    package = f"transformers.models.{model}"
    try:
        return getattr(importlib.import_module(f"{package}.image_processing_pil_{model}"), f"{name}ImageProcessorPil")
    except ModuleNotFoundError:
        return getattr(importlib.import_module(f"{package}.image_processing_{model}"), f"{name}ImageProcessor")


REFERENCES = {
    f"{name}ImageProcessor": reference_class(model, name)
    for model, name in (("clip", "CLIP"), ("bit", "Bit"), ("siglip", "Siglip"))
}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip 336, old form": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 336,
        "crop_size": 336,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
    },
    "clip, all defaults": {"image_processor_type": "CLIPImageProcessor"},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "rescale_factor": 0.00392156862745098,
    },
    "crop beyond the image": {"size": 100, "crop_size": {"height": 131, "width": 224}, "resample": 2},
    "not square": {"size": {"height": 90, "width": 57}, "do_center_crop": False, "resample": 1},
    "neither resized nor normalized": {
        "do_resize": False,
        "do_normalize": False,
        "crop_size": 65,
        "rescale_factor": 0.5,
    },
    "only resized": {"do_rescale": False, "do_normalize": False, "size": 50, "do_center_crop": False},
    "not rescaled": {"do_rescale": False, "image_mean": [3, 4, 5], "image_std": [7, 6, 5]},
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 384, "width": 384},
        "do_convert_rgb": True,
    },
}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


IMAGES: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": data.astronaut,
    "coffee, landscape": data.coffee,
    "coffee, portrait": lambda: np.swapaxes(data.coffee(), 0, 1),
    "camera, L": data.camera,
    "chelsea, odd sides": data.chelsea,
    "tiny": lambda: noise(2, 5),
    "thin": lambda: noise(401, 7),
    "odd": lambda: noise(223, 337),
}


def reference(config: dict[str, Any]) -> Any:
    kind = config.get("image_processor_type", "CLIPImageProcessor")
    return REFERENCES[kind](**{k: v for k, v in config.items() if not k.endswith("_type")})


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected, strict=True)


def composites() -> bool:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    settings = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    return bool(reference(settings)(clear)["pixel_values"][0].max() == 255)


needs_compositing = pytest.mark.skipif(
    not composites(), reason="this transformers drops alpha, or does not accept such arrays"
)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("config", CONFIGS)
def test_pil_images_give_the_pixels_of_transformers(config: str, image: str) -> None:
    picture = Image.fromarray(IMAGES[image]())
    actual = ImageProcessor(CONFIGS[config]).preprocess(picture)["pixel_values"][0]
    assert_same(actual, reference(CONFIGS[config]).preprocess(picture)["pixel_values"][0])


@needs_compositing
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparency_is_composited_on_white_as_in_transformers(mode: str) -> None:
    picture = Image.fromarray(noise(120, 201, 4))
    if mode in ("P", "RGB"):
        picture = picture.convert("RGB").convert(mode)
        picture.info["transparency"] = 0 if mode == "P" else picture.getpixel((0, 0))
    else:
        picture = picture.convert("LA").convert(mode) if mode == "PA" else picture.convert(mode)
    assert picture.mode == mode
    assert_same(ImageProcessor({})(picture).pixel_values[0], reference({})(picture).pixel_values[0])


FRACTIONS = noise(90, 140).astype(np.float32) / 255 * np.float32(0.99)


@pytest.mark.parametrize(
    ("array", "settings"),
    [
        pytest.param(noise(90, 140), {}, id="HWC"),
        pytest.param(noise(90, 140).transpose(2, 0, 1), {}, id="CHW"),
        pytest.param(noise(90, 140).astype(np.float64), {}, id="whole floats"),
        pytest.param(noise(90, 140).astype(np.int16), {}, id="int16"),
        pytest.param(FRACTIONS, {"do_rescale": False}, id="fractions"),
        pytest.param(FRACTIONS, {"do_rescale": False, "do_resize": False}, id="fractions, not resized"),
        pytest.param(FRACTIONS.astype(np.float64), {"do_rescale": False, "do_resize": False}, id="float64 stays"),
        pytest.param((noise(90, 140) > 99).astype(np.float32), {"do_rescale": False}, id="zeros and ones"),
        pytest.param(noise(90, 140, 4), {}, id="RGBA", marks=needs_compositing),
        pytest.param(noise(90, 140, 4) / 255, {"do_rescale": False}, id="RGBA fractions", marks=needs_compositing),
        pytest.param(noise(90, 140, 1)[None], {}, id="grey", marks=needs_compositing),
    ],
)
def test_arrays_and_tensors_give_the_pixels_of_transformers(array: np.ndarray, settings: dict[str, Any]) -> None:
    expected = reference(settings)(array)["pixel_values"][0]
    assert_same(ImageProcessor(settings)(array)["pixel_values"][0], expected)
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    assert_same(ImageProcessor(settings)(tensor)["pixel_values"][0], expected)


def test_batches_and_nested_lists_keep_their_order() -> None:
    images = np.stack([noise(30, 40), noise(40, 30).swapaxes(0, 1), noise(30, 40) // 2])
    processor = ImageProcessor({"size": 32, "crop_size": 32})
    expected = reference({"size": 32, "crop_size": 32})(list(images), return_tensors="np")["pixel_values"]
    pictures = [Image.fromarray(image) for image in images]
    for form in (images, torch.from_numpy(images), list(images), pictures, [pictures[:2], pictures[2:]], [images]):
        assert_same(processor(form, return_tensors="np")["pixel_values"], expected)


def test_calls_of_llava_work() -> None:
    processor = ImageProcessor(CONFIGS["clip 336, old form"])
    image = Image.fromarray(data.astronaut())
    pixels = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    assert tuple(int(x * 255) for x in processor.image_mean) == (122, 116, 104)
    assert processor.crop_size["height"] == processor.size["shortest_edge"] == 336
    assert isinstance(pixels, torch.Tensor)
    assert_same(pixels.numpy(), reference(CONFIGS["clip 336, old form"])(image)["pixel_values"][0])


def test_attributes_changed_by_a_caller_take_effect() -> None:
    processor = ImageProcessor({})
    image = Image.fromarray(data.coffee())
    processor.size["shortest_edge"] = 61
    processor.crop_size = {"height": 50, "width": 55}  # type: ignore[assignment] # it becomes a Size
    processor.image_mean = (0.1, 0.2, 0.3)
    changed = {"size": 61, "crop_size": {"height": 50, "width": 55}, "image_mean": [0.1, 0.2, 0.3]}
    assert_same(processor(image)["pixel_values"][0], reference(changed)(image)["pixel_values"][0])
    assert ImageProcessor({}).size == {"shortest_edge": 224}
    processor.do_normalize = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="do_normalize=None"):
        processor(image)


def test_overrides_last_one_call() -> None:
    processor = ImageProcessor({})
    image = Image.fromarray(data.coffee())
    pixels = processor(image, size={"shortest_edge": 40}, do_center_crop=False, image_std=None)["pixel_values"][0]
    assert_same(pixels, reference({"size": 40, "do_center_crop": False})(image)["pixel_values"][0])
    assert processor(image)["pixel_values"][0].shape == (3, 224, 224)


@pytest.mark.parametrize("config", CONFIGS)
def test_to_dict_makes_the_same_processor_here_and_in_transformers(config: str) -> None:
    processor = ImageProcessor(CONFIGS[config])
    image = Image.fromarray(data.chelsea())
    expected = processor(image)["pixel_values"][0]
    written = json.loads(json.dumps(processor.to_dict()))
    assert ImageProcessor(written).to_dict() == written
    assert_same(reference(written)(image)["pixel_values"][0], expected)


def test_a_siglip_config_names_its_final_size_as_crop_size() -> None:
    assert ImageProcessor(CONFIGS["siglip"]).crop_size == {"height": 384, "width": 384}


def test_configs_that_transformers_saves_are_read(tmp_path: Path) -> None:
    for kind in REFERENCES.values():
        kind().save_pretrained(tmp_path)
        assert ImageProcessor.from_file(tmp_path / "preprocessor_config.json").image_mean == list(kind().image_mean)
    extra = {"processor_class": "CLIPProcessor", "do_pad": False, "device": None, "data_format": "channels_first"}
    ImageProcessor({"image_processor_type": "CLIPImageProcessorFast", "_valid_processor_keys": ["size"], **extra})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"do_pad": True}, "do_pad=True"),
        ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints"),
        ({"data_format": "none"}, "data_format='none'"),
        ({"default_to_square": True}, "default_to_square=True"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "image_processor_type='LlavaNextImageProcessor'"),
        ({"resample": 9}, "resample=9"),
        ({"resample": 3.0}, "resample=3.0"),
        ({"resample": "bicubic"}, "resample='bicubic'"),
        ({"size": {"longest_edge": 224}}, r"size=\{'longest_edge': 224\}"),
        ({"size": {"shortest_edge": 224, "longest_edge": 400}}, "longest_edge"),
        ({"size": {"shortest_edge": 0}}, r"size=\{'shortest_edge': 0\}"),
        ({"crop_size": {"shortest_edge": 224}}, r"crop_size=\{'shortest_edge': 224\}"),
        ({"crop_size": 22.5}, "crop_size=22.5"),
        ({"do_resize": "yes"}, "do_resize='yes'"),
        ({"rescale_factor": "1/255"}, "rescale_factor='1/255'"),
        ({"image_mean": []}, r"image_mean=\[\]"),
        ({"image_std": [0.2, 0, 0.2]}, r"image_std=\[0.2, 0, 0.2\]"),
    ],
)
def test_unsupported_config_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ImageProcessor(config)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_file_that_is_not_a_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    for name in ("broken.json", "absent.json"):
        with pytest.raises(ConfigError, match=name):
            ImageProcessor.from_file(tmp_path / name)


def test_call_with_an_unsupported_argument_is_refused() -> None:
    processor = ImageProcessor({})
    image = Image.fromarray(noise(40, 60))
    for wrong in ({"do_pad": False}, {"resample": 7}, {"return_tensors": "tf"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            processor(image, **wrong)


@pytest.mark.parametrize(
    ("images", "settings", "actual"),
    [
        ("photo.jpg", {}, "str"),
        (Image.new("RGB", (0, 9)), {}, r"\(3, 9, 0\)"),
        (noise(40, 60, 1), {}, r"\(40, 60\)"),
        (noise(40, 60, 2), {}, r"\(40, 60, 2\)"),
        (noise(40, 60) * 2.0, {}, "0 to 255"),
        (noise(40, 60) / 100, {}, "0 to 1"),
        (noise(40, 60, 4) / 2, {}, "0 to 1"),
        (Image.fromarray(noise(40, 60, 1)), {"do_convert_rgb": False}, "1 channels, image_mean has 3"),
    ],
)
def test_unsupported_images_are_refused(images: Any, settings: dict[str, Any], actual: str) -> None:
    with pytest.raises(InputError, match=actual):
        ImageProcessor(settings)(images)


def test_unequal_sizes_make_a_list_but_not_a_batch() -> None:
    processor = ImageProcessor({"size": 20, "do_center_crop": False})
    images = [noise(40, 60), noise(60, 40)]
    assert [image.shape for image in processor(images).pixel_values] == [(3, 20, 30), (3, 30, 20)]
    with pytest.raises(InputError, match=r"\(3, 20, 30\), \(3, 30, 20\)"):
        processor(images, return_tensors="pt")
    with pytest.raises(InputError, match="empty"):
        processor([], return_tensors="np")


def test_a_batch_feature_is_a_dict_with_attributes_that_moves() -> None:
    batch = ImageProcessor({})(noise(40, 60), return_tensors="pt")
    batch["index"] = torch.tensor([3])
    assert batch.pixel_values is batch["pixel_values"]
    assert batch.to("cpu", torch.float16) is batch
    assert (batch.pixel_values.dtype, batch.index.dtype) == (torch.float16, torch.int64)
    assert batch.to("meta").index.device.type == "meta"
    with pytest.raises(AttributeError, match="pixel_mask"):
        _ = batch.pixel_mask


def test_importing_it_imports_neither_pillow_nor_transformers() -> None:
    code = "import sys, trtower.tower.image_processor; sys.exit(not {'PIL', 'transformers'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
