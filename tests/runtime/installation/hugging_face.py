"""Small random models of every class of transformers that reads a vision tower, and their inputs.

Their towers are those of conftest, so that the bundles of conftest fit. The language models are wide enough that an
image changes their answers.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.conftest import IMAGE_SIZE, MODELS, make_model
from trtower.layer_codes import LAST, LayerCode

IS_OLD = int(transformers.__version__.partition(".")[0]) < 5
TAKES_FEATURES = (
    "mm_encoder_outputs" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
)
IMAGE_TOKEN, VIDEO_TOKEN, VOCABULARY = 110, 111, 120
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PINPOINTS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
VIP_LAYERS = (-2, -3, -4, 1)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of transformers: its tower, the layer that it reads, and the rest of its config.

    ``frames`` is how many features it makes of a video of two frames; 0 if it accepts no videos.
    """

    model_class: str
    tower: str = "clip"
    layer: LayerCode = -2
    config: dict[str, Any] = field(default_factory=dict)
    tiles: bool = False
    frames: int = 0


STRATEGY = {"vision_feature_select_strategy": "full"}
KINDS = {
    "llava": Kind(model_class="Llava"),
    "llava-siglip": Kind(model_class="Llava", tower="siglip", config=STRATEGY),
    "llava-dinov2": Kind(model_class="Llava", tower="dinov2"),
    "vipllava": Kind(model_class="VipLlava", layer=list(VIP_LAYERS)),
    "llava_next": Kind(model_class="LlavaNext", config={"image_grid_pinpoints": PINPOINTS}, tiles=True),
    "llava_next_video": Kind(
        model_class="LlavaNextVideo",
        config={"image_grid_pinpoints": PINPOINTS, "spatial_pool_stride": 1, "spatial_pool_mode": "average"},
        tiles=True,
        frames=18,
    ),
    "llava_onevision": Kind(
        model_class="LlavaOnevision",
        tower="siglip",
        layer=-1,
        config=STRATEGY | {"image_grid_pinpoints": PINPOINTS, "vision_aspect_ratio": "anyres_max_9"},
        tiles=True,
        frames=9,
    ),
    "paligemma": Kind(model_class="PaliGemma", tower="siglip", layer=LAST, config={"projection_dim": 64}),
}


def make(name: str) -> Any:
    """Draw a model, the same one every time."""
    kind = KINDS[name]
    vision_class, options = MODELS[kind.tower]
    vision_config = getattr(transformers, vision_class).config_class(**options)
    text_class: Any = transformers.GemmaConfig if name == "paligemma" else transformers.LlamaConfig
    text_config = text_class(**TEXT | ({"head_dim": 16} if name == "paligemma" else {}))
    config_class = getattr(transformers, f"{kind.model_class}Config")
    layer = (
        {}
        if kind.layer == LAST
        else {("vision_feature_layers" if IS_OLD and name == "vipllava" else "vision_feature_layer"): kind.layer}
    )
    tokens = {"image_token_index": IMAGE_TOKEN} if IS_OLD else {"image_token_id": IMAGE_TOKEN}
    if kind.frames:
        tokens |= {"video_token_index": VIDEO_TOKEN} if IS_OLD else {"video_token_id": VIDEO_TOKEN}
    config = config_class(vision_config=vision_config, text_config=text_config, **tokens, **layer, **kind.config)
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind.model_class}ForConditionalGeneration")(config)
    draw(model)
    tower(model).load_state_dict(make_model(kind.tower).state_dict())
    model.generation_config.pad_token_id = 0
    return model.eval()


def draw(model: nn.Module) -> None:
    """Draw weights so that every part of a model matters."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def tower(model: Any) -> Any:
    return model.model.vision_tower


CASES = ("one image", "several images", "tiles", "video", "text")


def cases(name: str) -> list[str]:
    kind = KINDS[name]
    return [case for case in CASES if (kind.tiles or case != "tiles") and (kind.frames or case != "video")]


def pixels(name: str, case: str, seed: int = 0) -> dict[str, Any]:
    """Draw what the processor of a class returns for images, in FP32."""
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(seed)
    if case == "text":
        return {}
    if case == "video":
        return {"pixel_values_videos": torch.randn(1, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    count = 2 if case == "several images" else 1
    if not kind.tiles:
        return {"pixel_values": torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    sizes = {"one image": [[42, 42]], "several images": [[42, 42], [80, 40]], "tiles": [[80, 70]]}[case]
    tiles = [image_size_to_num_patches(size, PINPOINTS, IMAGE_SIZE) for size in sizes]
    drawn = torch.randn(count, max(tiles), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": drawn, "image_sizes": torch.tensor(sizes)}


@torch.no_grad()
def inputs(model: Any, name: str, case: str, seed: int = 0) -> dict[str, Any]:
    """Make images and a prompt with as many placeholders as the eager model returns features."""
    images = pixels(name, case, seed)
    ids = [1, 5]
    if case == "video":
        ids += [VIDEO_TOKEN] * KINDS[name].frames
    elif case != "text":
        output = model.model.get_image_features(**images)
        for features in getattr(output, "pooler_output", output):
            ids += [IMAGE_TOKEN] * features.shape[:-1].numel() + [6]
    prompt = torch.tensor([[*ids, 7, 8]])
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **images}
