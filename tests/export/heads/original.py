"""Small folders as the original LLaVA and VILA write them, each with a tower of conftest and a projector."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import WIDTH, make_model

TEXT = 40
Tensors = dict[str, Tensor]


def draw(**shapes: tuple[int, ...]) -> Tensors:
    """Draw tensors; an underscore in a name is a dot."""
    generator = torch.Generator().manual_seed(4)
    drawn = {name.replace("_", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name.replace("pre.norm", "pre_norm"): each / each.shape[-1] ** 0.5 for name, each in drawn.items()}


MLP = draw(**{"0_weight": (TEXT, WIDTH), "0_bias": (TEXT,), "2_weight": (TEXT, TEXT), "2_bias": (TEXT,)})
"""A projector of type mlp2x_gelu."""


def write_llava(folder: Path, clip: Path, projector: Tensors, **config: Any) -> Path:
    """Write an original LLaVA with its CLIP inside; ``clip`` is where the folder of that tower is written."""
    make_model("clip").save_pretrained(clip)
    inside = {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in make_model("clip").state_dict().items()
    }
    folder.mkdir()
    projected = {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    save_file(inside | projected | {"lm_head.weight": torch.ones(8, TEXT)}, folder / "model.safetensors")
    written = {
        "model_type": "llava_llama",
        "hidden_size": TEXT,
        "mm_hidden_size": WIDTH,
        "mm_vision_tower": str(clip),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder


def write_vila(folder: Path, projector: Tensors, kind: str, family: str = "siglip", **config: Any) -> Path:
    """Write a VILA: tower, projector and language model lie in folders of their own."""
    make_model(family).save_pretrained(folder / "vision_tower")
    (folder / "mm_projector").mkdir()
    layers = {f"layers.{name}": tensor for name, tensor in projector.items()}
    save_file(layers, folder / "mm_projector" / "model.safetensors")
    written = {
        "model_type": "llava_llama",
        "vision_tower_cfg": {},
        "mm_projector_cfg": {"mm_projector_type": kind},
        "llm_cfg": {"hidden_size": TEXT},
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
    }
    (folder / "config.json").write_text(json.dumps(written | config))
    return folder
