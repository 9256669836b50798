from typing import Any

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN


def get_model_name_from_path(path: str) -> str:
    return path.rpartition("/")[2]


def process_images(images: list[Any], image_processor: Any, config: Any) -> torch.Tensor:
    del config
    return torch.cat([image_processor.preprocess(image, return_tensors="pt")["pixel_values"] for image in images])


def tokenizer_image_token(prompt: str, tokenizer: Any, image_token: int, return_tensors: str) -> torch.Tensor:
    assert return_tensors == "pt"
    before, after = prompt.split(DEFAULT_IMAGE_TOKEN)
    return torch.tensor([*tokenizer.encode(before), image_token, *tokenizer.encode(after)])
