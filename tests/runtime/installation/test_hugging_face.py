"""The answers of models of transformers stay the same: every class, every kind of input."""

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
"""How much the logits change with the image: a thousand times what is demanded."""

OWN_ERROR = 1.5
"""Times the error that the model has in FP16 by itself: both towers are rounded, in other places."""

CASES = [(name, case) for name in KINDS for case in cases(name)]
SEEN = [(name, case) for name, case in CASES if case != "text"]


@torch.no_grad()
def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    return model(**given).logits


def generate(model: Any, given: dict[str, Any], **options: Any) -> list[int]:
    return model.generate(**given, max_new_tokens=6, do_sample=False, **options)[0].tolist()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_answers_in_fp32_are_the_models_own(name: str, case: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, case)
    before, said = logits(model, given), generate(model, given)
    with trtower.install(model, bundles(kind.tower, kind.layer)) as installed:
        calls: list[int] = []
        installed.tower.on_batch = lambda report: calls.append(report.batch)
        assert (logits(model, given) - before).abs().max() <= EXACT
        assert generate(model, given) == said
        assert bool(calls) == (case != "text")
    assert torch.equal(logits(model, given), before)


@pytest.mark.parametrize(("name", "case"), SEEN)
def test_image_matters(name: str, case: str) -> None:
    model = make(name)
    one, other = (inputs(model, name, case, seed) for seed in (0, 1))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert (logits(model, one) - logits(model, other)).abs().max() > MATTERS


@pytest.mark.parametrize(("name", "case"), SEEN)
def test_answers_in_fp16_are_within_the_models_own_error(name: str, case: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, case)
    exact = logits(model, given)
    model.half()
    own = (logits(model, given).float() - exact).abs().max()
    said = generate(model, given)
    with trtower.install(model, bundles(kind.tower, kind.layer, "fp16")):
        found = logits(model, given)
        assert found.dtype == torch.float16
        assert (found.float() - exact).abs().max() <= OWN_ERROR * own
        assert generate(model, given) == said


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_batch_of_prompts_and_beams(name: str, bundles: Bundles) -> None:
    model, kind = make(name), KINDS[name]
    given = inputs(model, name, "one image")
    batch = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in given.items()}
    said = generate(model, batch, num_beams=2)
    with trtower.install(model, bundles(kind.tower, kind.layer)):
        assert generate(model, batch, num_beams=2) == said
