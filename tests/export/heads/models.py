"""Small random models with a projector, one for each class of transformers, and the features that they compute."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IS_OLD = int(transformers.__version__.partition(".")[0]) < 5
IMAGE_SIZE, PATCH_SIZE, WIDTH, TEXT_WIDTH = 56, 14, 32, 48
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 120,
    "pad_token_id": 0,
}
GEMMA = TEXT | {"model_type": "gemma", "head_dim": 12}
PINPOINTS = [[IMAGE_SIZE, 2 * IMAGE_SIZE]]
TOKEN = {"image_token_index": 110} if IS_OLD else {"image_token_id": 110}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of transformers, and the tokens that its projector makes of an image or tile.

    ``tiles`` is whether it reads lists of tiles, which it puts together after it has projected them; ``nested`` is
    whether it reads lists of pictures for each prompt.
    """

    model: str
    tokens: int
    vision: dict[str, Any] = field(default_factory=lambda: CLIP)
    text: dict[str, Any] = field(default_factory=lambda: TEXT)
    config: dict[str, Any] = field(default_factory=dict)
    tiles: bool = False
    nested: bool = False


LAYERS = "vision_feature_layers" if IS_OLD else "vision_feature_layer"
TILES = {"image_grid_pinpoints": PINPOINTS}
INTERNVL = {
    **{name: value for name, value in VISION.items() if name not in ("image_size", "patch_size")},
    "model_type": "internvl_vision",
    "image_size": [IMAGE_SIZE] * 2,
    "patch_size": [PATCH_SIZE] * 2,
}
KINDS = {
    "llava": Kind(model="Llava", tokens=NUM_PATCHES),
    "llava-full": Kind(
        model="Llava",
        tokens=NUM_PATCHES + 1,
        config={"vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
    ),
    "llava-two-layers": Kind(model="Llava", tokens=NUM_PATCHES, config={"vision_feature_layer": [-3, -1]}),
    "vipllava": Kind(model="VipLlava", tokens=NUM_PATCHES, config={LAYERS: [-2, -3, 1]}),
    "llava_next": Kind(model="LlavaNext", tokens=NUM_PATCHES, config=TILES, tiles=True),
    "llava_next_video": Kind(model="LlavaNextVideo", tokens=NUM_PATCHES, config=TILES, tiles=True),
    "llava_onevision": Kind(
        model="LlavaOnevision",
        tokens=NUM_PATCHES,
        vision=SIGLIP,
        config=TILES | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        tiles=True,
    ),
    "paligemma": Kind(
        model="PaliGemma",
        tokens=NUM_PATCHES,
        vision=SIGLIP | {"projection_dim": TEXT_WIDTH},
        text=GEMMA,
        config={"projection_dim": TEXT_WIDTH},
    ),
    "gemma3": Kind(
        model="Gemma3",
        tokens=4,
        vision=SIGLIP,
        text=TEXT | {"model_type": "gemma3_text", "head_dim": 12},
        config={"mm_tokens_per_image": 4},
    ),
    "internvl": Kind(model="InternVL", tokens=NUM_PATCHES // 4, vision=INTERNVL, config={"downsample_ratio": 0.5}),
    "aya_vision": Kind(
        model="AyaVision",
        tokens=NUM_PATCHES // 4,
        vision=SIGLIP,
        config={"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "downsample_factor": 2},
    ),
    "cohere2_vision": Kind(
        model="Cohere2Vision",
        tokens=NUM_PATCHES // 4,
        vision=SIGLIP,
        config={"downsample_factor": 2, "alignment_intermediate_size": 32},
    ),
    "idefics3": Kind(
        model="Idefics3",
        tokens=NUM_PATCHES // 4,
        vision=VISION | {"model_type": "idefics3_vision"},
        config={"scale_factor": 2},
        nested=True,
    ),
    "smolvlm": Kind(
        model="SmolVLM",
        tokens=NUM_PATCHES // 4,
        vision=VISION | {"model_type": "smolvlm_vision"},
        config={"scale_factor": 2},
        nested=True,
    ),
}


if IS_OLD:  # it computes wrong positions, and is refused
    del KINDS["idefics3"], KINDS["smolvlm"]


def pixels(batch: int = 3) -> Tensor:
    """Draw images (B, 3, S, S)."""
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(5))


def make(name: str) -> Any:
    """Draw a model, the same one every time."""
    kind = KINDS[name]
    config_class = getattr(transformers, f"{kind.model}Config")
    token = {"image_token_id": 110} if kind.nested else TOKEN
    config = config_class(vision_config=dict(kind.vision), text_config=dict(kind.text), **token, **kind.config)
    model_class = getattr(transformers, f"{kind.model}ForConditionalGeneration")
    torch.manual_seed(3)
    model = model_class(config)
    for parameter in model.parameters():  # so that every part matters
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    # torch.matmul folds a batch, and so rounds otherwise, if weights could need a gradient; exported ones cannot.
    return model.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def features(model: Any, name: str, pixel_values: Tensor) -> Tensor:
    """Return the features (B, T, D) that the model's own code computes of images (B, 3, S, S).

    A model of tiles puts them together by the shape of the picture; of it, what the projector returns for each tile.
    """
    base = model.model
    if not KINDS[name].tiles:
        found = base.get_image_features(pixel_values=pixel_values[:, None] if KINDS[name].nested else pixel_values)
        found = getattr(found, "pooler_output", found)
        found = found if isinstance(found, Tensor) else torch.stack(list(found))
        return found.flatten(1, -2)
    projected: list[Tensor] = []
    hook = base.multi_modal_projector.register_forward_hook(lambda *call: projected.append(call[2]))
    # Each image is given as a picture of two tiles and the whole, which are the same three times.
    sizes = torch.tensor([[IMAGE_SIZE, 2 * IMAGE_SIZE]] * len(pixel_values))
    base.get_image_features(pixel_values=pixel_values[:, None].repeat(1, 3, 1, 1, 1), image_sizes=sizes)
    hook.remove()
    return projected[0].unflatten(0, (-1, 3))[:, 0]
