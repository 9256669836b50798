"""Notice pixel values that no image processor made: not finite, not normalised, or not even rescaled."""

import logging
import math

import numpy as np
import torch

from trtower.errors import InputError
from trtower.tower.image_processor import ImageProcessor

FAR = 3.0
"""Values this many expected ranges outside are no pixels in the expected units; noise and resizing stay well inside."""

BLACK = 0.003
"""Below this is the darkest pixel of pictures from 0 to 1. No value of 8 bits comes as near to 0 from above when it is
normalised, with CLIP's means (0.0033) or SigLIP's (0.0039): bright pictures, which are between 0 and 1 then, do not."""

logger = logging.getLogger(__name__)


class PixelRange:
    """Warns once, naming the range seen and the one expected, which is that of the tower's own image processor."""

    def __init__(self, tower: str, processor: ImageProcessor) -> None:
        self._tower, self._processor = tower, processor
        self._looked = self._warned = False

    def check(self, pixel_values: torch.Tensor, *, finite: bool | None) -> None:
        """Look at images where the engine reads them; raise InputError for NaN and infinity if they must be ``finite``.

        None is for those on the CPU. On a GPU images that need not be finite are looked at once only.
        """
        if finite is None:
            finite = pixel_values.device.type == "cpu"
        # Reading an extreme of pixels on a GPU waits for it, which a capture forbids: the runner refuses that in words.
        captured = pixel_values.is_cuda and torch.cuda.is_current_stream_capturing()
        if not finite and (self._looked or captured):
            return
        low, high = (float(extreme) for extreme in pixel_values.aminmax())  # NaN is both, if any is
        if finite and not (math.isfinite(low) and math.isfinite(high)):
            bad = pixel_values.numel() - int(pixel_values.isfinite().sum())
            raise InputError(f"images holds {bad} values that are NaN or infinite in {pixel_values.dtype}.")
        self._looked = True
        if self._warned:
            return
        try:
            least, most = expected_range(self._processor)
        except (TypeError, ValueError):  # settings that the processor itself refuses when it is called
            return
        is_unit = 0 <= low < BLACK and low < high <= 1 and not (least > -0.5 and most < 1.5)
        is_far = low < least - FAR * (most - least) or high > most + FAR * (most - least)
        if not is_unit and not is_far:
            return
        self._warned = True
        logger.warning(
            "images hold values from %.3g to %.3g; %s expects about %.3g to %.3g, rescaled and normalised: pass what "
            "tower.image_processor(images, return_tensors='pt')['pixel_values'] makes.",
            low, high, self._tower, least, most,
        )  # fmt: skip


def expected_range(processor: ImageProcessor) -> tuple[float, float]:
    """Return what black and white pixels become in an image processor, over all channels."""
    white = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if not processor.do_normalize:
        return 0.0, white
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = (np.array([[0.0], [white]]) - np.array(processor.image_mean)) / np.array(processor.image_std)  # (2, C)
    return float(ends.min()), float(ends.max())
