"""Rescale and normalise bytes inside the graph, exactly as the image processor would have done before it.

Shapes: B images, S pixels per side.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from trtower.errors import ConfigError
from trtower.spec import NHWC
from trtower.tower.image_processor import ImageProcessor

CHANNELS = 3
EVERY_BYTE = np.arange(256, dtype=np.uint8).reshape(1, 1, -1).repeat(CHANNELS, 0)
"""An image (3, 1, 256) with every value that a byte has."""


class PixelsFromBytes(nn.Module):
    """Turns bytes, (B, 3, S, S) or (B, S, S, 3), into pixel values (B, 3, S, S) in FP32.

    It computes as the processor does, step by step, and stays in FP32 when its tower is cast to half precision. Raises
    ConfigError if the result is not that of the processor to the bit, for every byte in every channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, processor: ImageProcessor, layout: str) -> None:
        super().__init__()
        self._channels_last = False
        for name in ("mean", "std"):
            numbers = torch.tensor(getattr(processor, f"image_{name}"), dtype=torch.float32)
            self.register_buffer(name, numbers.expand(CHANNELS).reshape(CHANNELS, 1, 1).clone())
        self._factor: float = processor.rescale_factor
        self._divides = False
        expected = _every_pixel(processor.preparing_floats())
        if not torch.equal(self(torch.from_numpy(EVERY_BYTE[None])), expected):
            self._factor, self._divides = 1 / self._factor, True
        if not torch.equal(self(torch.from_numpy(EVERY_BYTE[None])), expected):
            raise ConfigError(
                f"rescale_factor={processor.rescale_factor} cannot be repeated exactly in the graph, as 1/255 can: "
                "export without --pixels uint8."
            )
        self._channels_last = layout == NHWC

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Prepare bytes for the tower."""
        pixels = pixel_values.to(torch.float32)  # before all else: TensorRT does nothing with bytes but cast them
        pixels = pixels.permute(0, 3, 1, 2) if self._channels_last else pixels
        rescaled = pixels / self._factor if self._divides else pixels * self._factor
        return (rescaled - self.mean) / self.std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never cast."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self


def _every_pixel(processor: ImageProcessor) -> Tensor:
    """Return what a processor makes of every byte in every channel: (1, 3, 1, 256)."""
    prepared: Tensor = processor.preprocess(
        EVERY_BYTE,
        return_tensors="pt",
        input_data_format="channels_first",
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=False,
    )["pixel_values"]
    return prepared
