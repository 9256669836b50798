"""Models of transformers answer as before: every class, every kind of input."""

from typing import Any

import pytest
import torch

import trtower
from tests.conftest import Bundles
from tests.runtime.installation.hugging_face import KINDS, cases, inputs, make

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-4
"""Of logits around 4, in FP32: kernels sum in another order."""

MATTERS = 0.1
"""The logits change by at least this much with the image: a thousand times EXACT."""

OWN_ERROR = 1.5
"""A multiple of the eager model's own error in FP16: both towers round, but in different places."""

CASES = [(name, case) for name in KINDS for case in cases(name)]
WITH_IMAGES = [(name, case) for name, case in CASES if case != "text"]


@torch.no_grad()
def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return model(**given).logits


def generate(model: Any, given: dict[str, Any], **options: Any) -> list[int]:
    return model.generate(**given, max_new_tokens=6, do_sample=False, **options)[0].tolist()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_answers_in_fp32_are_those_of_the_eager_tower(name: str, case: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, case)
    before, expected = logits(model, given), generate(model, given)
    with trtower.install(model, bundles(kind.tower, kind.layer)) as installed:
        calls: list[int] = []
        installed.tower.on_batch = lambda report: calls.append(report.batch)
        assert (logits(model, given) - before).abs().max() <= EXACT
        assert generate(model, given) == expected
        assert bool(calls) == (case != "text")
    assert torch.equal(logits(model, given), before)


@pytest.mark.parametrize(("name", "case"), WITH_IMAGES)
def test_image_matters(name: str, case: str) -> None:
    model = make(name)
    one, other = (inputs(model, name, case, seed) for seed in (0, 1))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert (logits(model, one) - logits(model, other)).abs().max() > MATTERS


@pytest.mark.parametrize(("name", "case"), WITH_IMAGES)
def test_answers_in_fp16_are_within_the_eager_towers_error(name: str, case: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, case)
    exact = logits(model, given)
    model.half()
    own = (logits(model, given).float() - exact).abs().max()
    expected = generate(model, given)
    with trtower.install(model, bundles(kind.tower, kind.layer, "fp16")):
        actual = logits(model, given)
        assert actual.dtype == torch.float16
        assert (actual.float() - exact).abs().max() <= OWN_ERROR * own
        assert len(generate(model, given)) == len(expected)  # in FP16 two tokens can be equally good


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_batch_of_prompts_with_beams_answers_as_before(name: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, "one image")
    batch = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in given.items()}

    def answers() -> list[list[int]]:
        return model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=2).tolist()

    expected = answers()
    with trtower.install(model, bundles(kind.tower, kind.layer)):
        assert answers() == expected
