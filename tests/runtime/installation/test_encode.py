"""Images are encoded apart from the language model, in another process too."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import trtower
from tests.conftest import Bundles
from tests.runtime.installation.hugging_face import IMAGE_TOKEN, KINDS, TAKES_FEATURES, cases, inputs, make
from tests.runtime.installation.test_hugging_face import generate
from trtower.errors import ConfigError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

new = pytest.mark.skipif(not TAKES_FEATURES, reason="generate of this transformers takes no features")

SEEN = [(name, case) for name in KINDS for case in cases(name) if case != "text"]


def prompt(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("input_ids", "attention_mask")}


@new
@pytest.mark.parametrize(("name", "case"), SEEN)
def test_features_take_the_place_of_pixels(name: str, case: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, case)
    said = generate(model, given)
    with trtower.install(model, bundles(kind.tower, kind.layer)):
        encoded = trtower.encode_for(model, given)
    assert [*encoded] == ["video" if case == "video" else "image"]
    model.model.vision_tower = None  # the language model's process needs none
    assert generate(model, prompt(given), mm_encoder_outputs=encoded) == said


@new
def test_pixels_alone_are_enough_where_a_model_asks_for_no_more(bundles: Bundles) -> None:
    model = make("llava")
    given = inputs(model, "llava", "several images")
    with trtower.install(model, bundles()):
        one, other = trtower.encode_for(model, given["pixel_values"]), trtower.encode_for(model, given)
    assert type(one["image"]) is transformers.modeling_outputs.BaseModelOutputWithPooling
    for alone, whole in zip(one["image"].pooler_output, other["image"].pooler_output, strict=True):
        assert torch.equal(alone, whole)
        assert not alone.requires_grad


@new
def test_what_cannot_be_encoded_is_said(bundles: Bundles) -> None:
    model = make("llava")
    with pytest.raises(ConfigError, match=r"has no bundle installed: call trtower\.install\(model, bundle\) first"):
        trtower.encode_for(model, torch.zeros(1, 3, 42, 42))
    with trtower.install(model, bundles()):
        with pytest.raises(InputError, match="images has input_ids; expected pixel_values or pixel_values_videos"):
            trtower.encode_for(model, {"input_ids": torch.tensor([[IMAGE_TOKEN]])})
        with pytest.raises(ConfigError, match="cannot encode video: leave pixel_values_videos out of images"):
            trtower.encode_for(model, {"pixel_values_videos": torch.zeros(1, 2, 3, 42, 42)})
    model = make("llava_next")
    with trtower.install(model, bundles()), pytest.raises(InputError, match="image_sizes"):
        trtower.encode_for(model, torch.zeros(1, 3, 3, 42, 42))


@pytest.mark.skipif(TAKES_FEATURES, reason="generate of this transformers takes features")
def test_transformers_that_takes_no_features_is_told(bundles: Bundles) -> None:
    model = make("llava")
    with trtower.install(model, bundles()), pytest.raises(ConfigError, match="forward has no mm_encoder_outputs"):
        trtower.encode_for(model, torch.zeros(1, 3, 42, 42))


def test_model_in_a_wrapper_is_asked_for(bundles: Bundles) -> None:
    model = torch.compile(make("llava"))
    with (
        trtower.install(model, bundles()),
        pytest.raises(ConfigError, match=r"pass the one inside it, model\._orig_mod\."),
    ):
        trtower.encode_for(model, torch.zeros(1, 3, 42, 42))


def encode_elsewhere(checkpoint: str, bundle: str, images: dict[str, Any], queue: Any) -> None:
    """Be the process that sees: it has the model's tower and projector, and answers with features."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)
    with trtower.install(model, bundle):
        encoded = trtower.encode_for(model, images)
    torch.save(encoded, queue)


@new
@pytest.mark.parametrize("name", ["llava", "llava_next", "vipllava"])
def test_another_process_encodes(name: str, bundles: Bundles, tmp_path: Path) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, "several images")
    said = generate(model, given)
    model.save_pretrained(tmp_path / "model")
    images = {key: value for key, value in given.items() if key in ("pixel_values", "image_sizes")}
    arguments = (str(tmp_path / "model"), str(bundles(kind.tower, kind.layer)), images, tmp_path / "features.pt")
    process = multiprocessing.get_context("spawn").Process(target=encode_elsewhere, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    encoded = torch.load(tmp_path / "features.pt", weights_only=False)
    model.model.vision_tower = None
    assert generate(model, prompt(given), mm_encoder_outputs=encoded) == said
