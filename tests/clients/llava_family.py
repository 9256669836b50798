"""What the scripts for LLaVA and LLaVA-NeXT share: how to install a bundle, and what to observe of a loaded model."""

from pathlib import Path
from typing import Any

import torch
from comparing import Observation
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from PIL import Image

import trtower

Loaded = tuple[Any, Any, Any, Any]
"""The tokenizer, model, image processor and context length that both loaders return."""


def install(loaded: Loaded, bundle: Path) -> trtower.Installation:
    return trtower.install(loaded[1], bundle)


@torch.inference_mode()
def observe(
    loaded: Loaded,
    images: list[Image.Image],
    numbers: tuple[str, ...] = ("hidden_size", "num_patches", "num_patches_per_side"),
    lists: bool = True,
    projected: bool = False,
) -> Observation:
    """Run a model on one picture and on all of them: preparation, tower, logits, greedy tokens.

    With ``projected`` it is not the tower that is called, but what also runs the projector.
    """
    tokenizer, model, image_processor, _ = loaded
    tower = model.get_vision_tower()
    observed = {}
    for name, some in (("one picture", images[:1]), (f"{len(images)} pictures", images)):
        pixels = process_images(some, image_processor, model.config)
        pixels = [image.half() for image in pixels] if type(pixels) is list else pixels.half()
        prompt = "USER: " + "<image>" * len(some) + " what is in this picture ASSISTANT:"
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        sizes = [image.size for image in some]
        tiles = [image if image.ndim == 4 else image[None] for image in pixels]
        observed[f"pixels of {name}"] = torch.cat(tiles)
        if projected:
            observed[f"projected of {name}"] = model.encode_images(torch.cat(tiles))
        else:
            observed[f"features of {name}"] = tower(torch.cat(tiles))
        if lists and not projected and tiles[0].shape[0] == 1:
            observed[f"features of {name} in a list"] = torch.cat(tower([tile[0] for tile in tiles]))
        observed[f"logits of {name}"] = model(input_ids=ids, images=pixels, image_sizes=sizes).logits
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "use_cache": True, "pad_token_id": 0}
        observed[f"tokens of {name}"] = model.generate(ids, images=pixels, image_sizes=sizes, **options)
    observed["numbers of the tower"] = torch.tensor([getattr(tower, name) for name in numbers])
    return observed
