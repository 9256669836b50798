from typing import Any

import torch
from PIL import Image


def load_images(paths: list[str]) -> list[Any]:
    return [Image.open(path).convert("RGB") for path in paths]


def process_images(images: list[Any], image_processor: Any, config: Any) -> torch.Tensor:
    del config
    return torch.cat([image_processor.preprocess(image, return_tensors="pt")["pixel_values"] for image in images])
