"""Images can be encoded apart from the language model, even in another process."""

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

new = pytest.mark.skipif(not TAKES_FEATURES, reason="generate of this transformers accepts no features")

WITH_IMAGES = [(name, case) for name in KINDS for case in cases(name) if case != "text"]


def prompt(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("input_ids", "attention_mask")}


@new
@pytest.mark.parametrize(("name", "case"), WITH_IMAGES)
def test_features_replace_pixels(name: str, case: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, case)
    expected = generate(model, given)
    with trtower.install(model, bundles(kind.tower, kind.layer)):
        encoded = trtower.encode_for(model, given)
    assert [*encoded] == ["video" if case == "video" else "image"]
    model.model.vision_tower = None  # the process of the language model needs none
    assert generate(model, prompt(given), mm_encoder_outputs=encoded) == expected


@new
def test_pixel_values_are_enough_if_a_model_requires_no_more(bundles: Bundles) -> None:
    model = make("llava")
    given = inputs(model, "llava", "several images")
    with trtower.install(model, bundles()):
        one, other = trtower.encode_for(model, given["pixel_values"]), trtower.encode_for(model, given)
    assert type(one["image"]) is transformers.modeling_outputs.BaseModelOutputWithPooling
    outputs: list[Any] = [encoded["image"].pooler_output for encoded in (one, other)]
    for alone, whole in zip(*outputs, strict=True):
        assert torch.equal(alone, whole)
        assert not alone.requires_grad


@new
def test_what_cannot_be_encoded_is_refused(bundles: Bundles) -> None:
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


@pytest.mark.skipif(TAKES_FEATURES, reason="generate of this transformers accepts features")
def test_transformers_without_mm_encoder_outputs_is_refused(bundles: Bundles) -> None:
    model = make("llava")
    with trtower.install(model, bundles()), pytest.raises(ConfigError, match="forward has no mm_encoder_outputs"):
        trtower.encode_for(model, torch.zeros(1, 3, 42, 42))


def test_error_names_the_model_inside_a_wrapper(bundles: Bundles) -> None:
    model: Any = torch.compile(make("llava"))
    with (
        trtower.install(model, bundles()),
        pytest.raises(ConfigError, match=r"pass the one inside it, model\._orig_mod\."),
    ):
        trtower.encode_for(model, torch.zeros(1, 3, 42, 42))


def encode_elsewhere(checkpoint: str, bundle: str, images: dict[str, Any], path: Path) -> None:
    """Run as the encoding process: load the model with its tower and projector, and save the features."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)
    with trtower.install(model, bundle):
        encoded = trtower.encode_for(model, images)
    torch.save(encoded, path)


@new
@pytest.mark.parametrize("name", ["llava", "llava_next", pytest.param("vipllava", marks=pytest.mark.slow)])
def test_another_process_encodes(name: str, bundles: Bundles, tmp_path: Path) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, "several images")
    expected = generate(model, given)
    model.save_pretrained(tmp_path / "model")
    images = {key: value for key, value in given.items() if key in ("pixel_values", "image_sizes")}
    arguments = (str(tmp_path / "model"), str(bundles(kind.tower, kind.layer)), images, tmp_path / "features.pt")
    process = multiprocessing.get_context("spawn").Process(target=encode_elsewhere, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    encoded = torch.load(tmp_path / "features.pt", weights_only=False)
    model.model.vision_tower = None
    assert generate(model, prompt(given), mm_encoder_outputs=encoded) == expected
