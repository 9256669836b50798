"""Frames, prepared by a bundle's processor and by the policies' own code, bit for bit."""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.policies.conftest import Saved
from tests.policies.small import CAMERAS, observe
from trtower import VisionTower
from trtower.tower.image_processor import ImageProcessor

image_tools = pytest.importorskip("openpi_client.image_tools", reason="for LeRobot's environment: make test-lerobot")
vla_utils = pytest.importorskip("lerobot.policies.common.vla_utils", reason="needs LeRobot: make test-lerobot")

SHAPES = [(480, 640), (720, 1280), (640, 480), (224, 224), (100, 133), (37, 50), (225, 224), (512, 512), (511, 300)]


def lerobot(frames: Tensor, side: int) -> Tensor:
    """As `PI0Policy._preprocess_images` does it with (B, C, H, W) from 0 to 1."""
    last = frames.permute(0, 2, 3, 1)
    if last.shape[1:3] != (side, side):
        last = vla_utils.resize_with_pad_torch(last, side, side)
    return (last * 2.0 - 1.0).permute(0, 3, 1, 2)


def smolvla(frames: Tensor, side: int) -> Tensor:
    """As `SmolVLAPolicy.prepare_images` does it."""
    return vla_utils.resize_with_pad(frames, side, side, pad_value=0) * 2.0 - 1.0


def openpi(frame: np.ndarray, side: int) -> Tensor:
    """As openpi's `ResizeImages` and `Observation.from_dict` do it with (H, W, C) of bytes."""
    resized = image_tools.resize_with_pad(frame, side, side)
    return torch.from_numpy(resized)[None].to(torch.float32).permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0


def processor(padding: str, side: int, **others: Any) -> ImageProcessor:
    settings = {"image_processor_type": "ResizeWithPadImageProcessor", "size": {"height": side, "width": side}}
    return ImageProcessor(settings | {"resize_with_pad": padding} | others)


def frame_of(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("side", [224, 512])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("padding", "theirs"), [("lerobot", lerobot), ("smolvla", smolvla)])
def test_lerobots_pixels(padding: str, theirs: Callable[..., Tensor], shape: tuple[int, int], side: int) -> None:
    frame = frame_of(shape)
    fractions = torch.from_numpy(frame)[None].permute(0, 3, 1, 2).contiguous().float() / 255
    expected = theirs(fractions, side)
    for form in (frame, fractions[0], fractions[0].numpy(), fractions):
        assert torch.equal(processor(padding, side)(form, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("side", [224, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_openpis_pixels(shape: tuple[int, int], side: int) -> None:
    frame = frame_of(shape)
    actual = processor("openpi", side)(frame, return_tensors="pt").pixel_values
    assert torch.equal(actual, openpi(frame, side))


@pytest.mark.parametrize("shape", SHAPES)
def test_openpis_pixels_in_pytorch(shape: tuple[int, int]) -> None:
    """LeRobot says that its function is a copy of openpi's, which has -1 for 0 where the values are from -1 to 1."""
    source = inspect.getsource(vla_utils.resize_with_pad_torch).replace("clamp(0.0, 1.0)", "clamp(-1.0, 1.0)")
    source = source.replace("uint8 else 0.0", "uint8 else -1.0")
    assert source.count("-1.0") == 2
    of_openpi: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "F": torch.nn.functional}
    exec(compile(ast.parse(source), "openpi", "exec"), of_openpi)  # noqa: S102 - its own source, with two numbers changed
    frame = frame_of(shape)
    signed = torch.from_numpy(frame)[None].to(torch.float32).permute(0, 3, 1, 2) / 255.0 * 2.0 - 1.0
    expected = of_openpi["resize_with_pad_torch"](signed, 224, 224)
    actual = processor("openpi_pytorch", 224)(frame, return_tensors="pt").pixel_values
    assert torch.equal(actual, expected)


def test_encode_gives_the_features_that_the_policy_gets(saved: Saved) -> None:
    """A dict of frames from the cameras, against what the policy's own code hands to its tower."""
    batch = observe()
    prepare = saved.policy.prepare_images if saved.kind == "smolvla" else saved.policy._preprocess_images
    images, _ = prepare(batch)
    tower = VisionTower.load(saved.bundles["projector"], backend="onnxruntime-cpu")
    frames = {name: batch[f"observation.images.{name}"] for name in CAMERAS}
    encoded = tower.encode(frames)
    assert [*encoded] == [*CAMERAS]
    for name, image in zip(CAMERAS, images, strict=False):
        pixel_values = tower.image_processor(frames[name], return_tensors="pt").pixel_values
        assert torch.equal(pixel_values, image)
        torch.testing.assert_close(encoded[name], tower(image), rtol=1e-5, atol=1e-5)
