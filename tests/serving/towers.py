"""Towers that real servers serve, what clients send them, and what the same tower answers in this process."""

from typing import Any

import numpy as np
import torch

from tests.conftest import BATCH
from tests.pictures import picture
from trtower import VisionTower

Array = Any
KINDS = {
    "fp16": {"precision": "fp16"},
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "uint8": {"pixels": "uint8", "layout": "nhwc"},
    "uint8-nchw": {"pixels": "uint8"},
}
"""How each bundle is exported."""


def pixels(tower: VisionTower, batch: int, seed: int = 0) -> Array:
    """Make an input of a model: what the image processor makes of pictures, as the client passes it."""
    pictures = [picture(seed + index) for index in range(batch)]
    prepared: torch.Tensor = tower.image_processor(pictures, return_tensors="pt")["pixel_values"]
    if tower.spec.takes_floats:
        prepared = prepared.to(torch.float32 if tower.dtype == torch.bfloat16 else tower.dtype)
    return prepared.numpy()


def expect(tower: VisionTower, array: Array) -> Array:
    features = tower.run_prepared(torch.from_numpy(array))
    return features.to(torch.float32 if tower.dtype == torch.bfloat16 else None).numpy()


def is_answer(tower: VisionTower, array: Array, answer: Array) -> bool:
    """Whether these are the features of these images, whoever they were batched with.

    An image's features may depend on how many images ran, and on nothing else.
    """

    def is_row(image: Array, row: Array) -> bool:
        batches = (np.repeat(image[None], size, axis=0) for size in range(1, BATCH.max + 1))
        return any((expect(tower, batch) == row).all((1, 2)).any() for batch in batches)

    return len(array) == len(answer) and all(is_row(*each) for each in zip(array, answer, strict=True))
