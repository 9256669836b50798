"""Models that read their tower in unusual ways: under another name, or another output."""

from typing import Any

import pytest
import torch
import transformers

import trtower
from tests.conftest import IMAGE_SIZE, MODELS, Bundles, make_model
from tests.runtime.installation.hugging_face import IMAGE_TOKEN, TEXT, VOCABULARY, draw
from tests.runtime.installation.test_hugging_face import EXACT, MATTERS, logits
from trtower.errors import ConfigError
from trtower.layer_codes import LAST

pytestmark = pytest.mark.usefixtures("one_thread")

QFORMER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "encoder_hidden_size": 64,
    "vocab_size": 50,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 128,
}


def vision_config(tower: str) -> Any:
    vision_class, options = MODELS[tower]
    return getattr(transformers, vision_class).config_class(**options)


def build(model_class: Any, config: Any, tower: str) -> Any:
    torch.manual_seed(3)
    model = model_class(config)
    draw(model)
    for module in model.modules():
        if type(module).__name__ == MODELS[tower][0]:
            module.load_state_dict(make_model(tower).state_dict())
    return model.eval()


def internvl() -> Any:
    config = transformers.InternVLConfig(
        vision_config=vision_config("internvl_vision-normed"),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=1.0,
        vision_feature_layer=-1,
    )
    return build(transformers.InternVLForConditionalGeneration, config, "internvl_vision-normed")


def blip2() -> Any:
    config = transformers.Blip2Config(
        vision_config=vision_config("eva_clip").to_dict(),
        qformer_config=QFORMER,
        text_config=OPT,
        num_query_tokens=4,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,  # type: ignore[call-arg] # its other name
    )
    return build(transformers.Blip2ForConditionalGeneration, config, "eva_clip")


def prompt(tokens: int, seed: int = 0) -> dict[str, Any]:
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * tokens, 7]])
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize(
    ("make", "tower", "tokens"),
    [(internvl, "internvl_vision-normed", 9), (blip2, "eva_clip", 4)],
    ids=["internvl", "blip2"],
)
def test_model_that_requests_more_than_it_reads(make: Any, tower: str, tokens: int, bundles: Bundles) -> None:
    model = make()
    before = logits(model, prompt(tokens))
    assert (logits(model, prompt(tokens, seed=1)) - before).abs().max() > MATTERS
    with trtower.install(model, bundles(tower, LAST)):
        assert (logits(model, prompt(tokens)) - before).abs().max() <= EXACT
    assert torch.equal(logits(model, prompt(tokens)), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: transformers.Dinov2Backbone(vision_config("dinov2")),
            "returns feature_maps; a bundle returns only hidden states",
        ),
        (
            lambda: transformers.CLIPVisionModelWithProjection(vision_config("clip")),
            "returns image_embeds; a bundle returns only hidden states",
        ),
        (
            lambda: transformers.Siglip2VisionModel(vision_config("siglip2")),
            r"is of family clip|has image_size=None",
        ),
    ],
    ids=["backbone", "projection", "naflex"],
)
def test_tower_that_returns_something_else_is_refused(make: Any, words: str, bundles: Bundles) -> None:
    holder = torch.nn.ModuleDict({"tower": make()}).eval()
    eager = holder["tower"]
    tower = "dinov2" if "Dinov2" in type(eager).__name__ else "clip"
    with pytest.raises(ConfigError, match=words):
        trtower.install(holder, bundles(tower), allow_other_weights=True)
    assert holder["tower"] is eager
