"""Detect pixel values that no image processor made: not finite, not normalised, or not even rescaled."""

import logging
import math

import numpy as np
import torch

from trtower.errors import InputError
from trtower.tower.image_processor import ImageProcessor

FAR = 3.0
"""Values outside the expected range by more than this many times its width are not pixels in the expected units. Noise
and resizing stay well inside."""

BLACK = 0.003
"""Pixels from 0 to 1 that nobody normalised usually have a smallest value below this. A normalised 8-bit value never
comes as close to 0 from above, with CLIP's means (0.0033) or SigLIP's (0.0039). So there is no false warning about
bright pictures, whose normalised values are between 0 and 1 too."""

logger = logging.getLogger(__name__)


class PixelRange:
    """Warns once if pixel values are far from what the tower's image processor makes, naming both ranges."""

    def __init__(self, tower: str, processor: ImageProcessor) -> None:
        self._tower, self._processor = tower, processor
        self._inspected = self._warned = False

    def check(self, pixel_values: torch.Tensor, *, finite: bool | None) -> None:
        """Inspect images on the engine's device; raise InputError for NaN and infinity if they must be ``finite``.

        None requires that on the CPU only. Images that need not be finite are inspected in the first call only.
        """
        if finite is None:
            finite = pixel_values.device.type == "cpu"
        # Reading values waits for the GPU, which a capture forbids; Engine.lend refuses captures with a message.
        captured = pixel_values.is_cuda and torch.cuda.is_current_stream_capturing()
        if not finite and (self._inspected or captured):
            return
        low, high = (float(extreme) for extreme in pixel_values.aminmax())  # if any value is NaN, both are
        if finite and not (math.isfinite(low) and math.isfinite(high)):
            bad = pixel_values.numel() - int(pixel_values.isfinite().sum())
            raise InputError(
                f"images holds {bad} values that are NaN or infinite in {pixel_values.dtype}: correct them, or set the "
                "tower's check_finite=False to let them through."
            )
        self._inspected = True
        if self._warned:
            return
        try:
            least, most = expected_range(self._processor)
        except (TypeError, ValueError):  # invalid settings: the processor refuses them when it is called
            return
        is_unit = 0 <= low < BLACK and low < high <= 1 and not (least > -0.5 and most < 1.5)
        is_far = low < least - FAR * (most - least) or high > most + FAR * (most - least)
        if not is_unit and not is_far:
            return
        self._warned = True
        logger.warning(
            "images hold values from %.3g to %.3g; %s expects about %.3g to %.3g, rescaled and normalised. Pass "
            "tower.image_processor(images, return_tensors='pt')['pixel_values'].",
            low, high, self._tower, least, most,
        )  # fmt: skip


def expected_range(processor: ImageProcessor) -> tuple[float, float]:
    """Return the lowest and highest value that an image processor makes of black and white, over all channels."""
    white = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if not processor.do_normalize:
        return 0.0, white
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = (np.array([[0.0], [white]]) - np.array(processor.image_mean)) / np.array(processor.image_std)  # (2, C)
    return float(ends.min()), float(ends.max())
