"""Models that read their tower in unusual ways: under another name, or another output."""

from typing import Any

import pytest
import torch
import transformers

import trtower
from tests.conftest import IMAGE_SIZE, IS_OLD, MODELS, POSITIONS, Bundles, make_model
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


def idefics3(kind: str = "Idefics3", tower: str = "idefics3_vision") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision_config(tower),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN,
        scale_factor=1,
    )
    return build(getattr(transformers, f"{kind}ForConditionalGeneration"), config, tower)


def smolvlm() -> Any:
    return idefics3("SmolVLM", "smolvlm_vision")


def prompt(model: Any, tokens: int, seed: int = 0) -> dict[str, Any]:
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * tokens, 7]])
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    tiled = model.config.model_type in ("idefics3", "smolvlm")
    pixels = pixels[None] if tiled else pixels
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


FULL_GRIDS = [] if IS_OLD else [(idefics3, "idefics3_vision"), (smolvlm, "smolvlm_vision")]
OTHERS = [(internvl, "internvl_vision-normed", 9), (blip2, "eva_clip", 4), *((*each, 9) for each in FULL_GRIDS)]


@pytest.mark.parametrize(("make", "tower", "tokens"), OTHERS)
def test_model_that_requests_more_than_it_reads(make: Any, tower: str, tokens: int, bundles: Bundles) -> None:
    model = make()
    given = prompt(model, tokens)
    before = logits(model, given)
    assert (logits(model, prompt(model, tokens, seed=1)) - before).abs().max() > MATTERS
    with trtower.install(model, bundles(tower, LAST)):
        assert (logits(model, given) - before).abs().max() <= EXACT
    assert torch.equal(logits(model, given), before)


@pytest.mark.skipif(IS_OLD, reason=POSITIONS)
def test_tower_that_older_releases_named_like_its_model_is_recognised(bundles: Bundles) -> None:
    model = idefics3()
    model.model.vision_model.config.model_type = "idefics3"
    given = prompt(model, 9)
    before = logits(model, given)
    with trtower.install(model, bundles("idefics3_vision", LAST)):
        assert (logits(model, given) - before).abs().max() <= EXACT


@pytest.mark.parametrize(("make", "tower"), FULL_GRIDS)
def test_padded_patches_are_refused_and_a_mask_of_ones_is_not(make: Any, tower: str, bundles: Bundles) -> None:
    model = make()
    given = prompt(model, 9)
    mask = torch.ones(1, 1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64)
    before = logits(model, given)
    padded = mask.clone()
    padded[..., IMAGE_SIZE // 3 :] = 0
    assert (logits(model, given | {"pixel_attention_mask": padded}) - before).abs().max() > MATTERS
    with trtower.install(model, bundles(tower, LAST)) as installed:
        assert installed.path == "model.vision_model"
        assert (logits(model, given | {"pixel_attention_mask": mask}) - before).abs().max() <= EXACT
        with pytest.raises(ConfigError, match=r"cannot mask patches, but patch_attention_mask masks 6: pass pictures"):
            logits(model, given | {"pixel_attention_mask": padded})


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
