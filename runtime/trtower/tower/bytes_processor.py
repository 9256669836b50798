"""The image processor of a bundle that takes bytes."""

from typing import TYPE_CHECKING, Any

import numpy as np

from trtower.errors import ConfigError, InputError
from trtower.tower.dicts import BatchFeature
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.pictures import Array, Images

if TYPE_CHECKING:
    from PIL.Image import Image

OF_THE_ENGINE = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""The settings of what the engine does itself, if it takes bytes."""


class BytesProcessor(ImageProcessor):
    """The processor of a bundle that takes bytes: it stops there, because the engine rescales and normalises."""

    def preprocess(self, images: Images, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """Turn pictures into bytes; see `ImageProcessor.preprocess`.

        Args:
            images: PIL images, or arrays or tensors of dtype uint8, otherwise as of `ImageProcessor.preprocess`.
            return_tensors: As of `ImageProcessor.preprocess`.
            **options: The others, but for those of rescaling and normalising.

        Returns:
            A dict with ``pixel_values`` of dtype uint8.

        Raises:
            InputError: As of `ImageProcessor.preprocess`, and for values of another dtype.
            ConfigError: If an option asks for what the engine does.
        """
        if asked := [name for name in OF_THE_ENGINE if options.get(name) is not None]:
            raise ConfigError(f"{asked[0]} is not for this bundle, whose engine rescales and normalises: leave it out.")
        return super().preprocess(images, return_tensors, **options)

    __call__ = preprocess

    def _pixels(self, name: str, picture: "Image | Array", input_data_format: str | None) -> Array:
        if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
            whole = np.array_equal(picture, np.round(picture)) and picture.max(initial=0) > 1
            how = f"{name}.astype(np.uint8)" if whole else f"({name} * 255).round().astype(np.uint8)"
            raise InputError(
                f"{name} has dtype {picture.dtype}, but this bundle takes bytes from 0 to 255: pass {how}."
            )
        return super()._pixels(name, picture, input_data_format)
