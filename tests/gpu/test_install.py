"""A bundle in a model that is on a GPU: the same answers, the memory given back, and the way there and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trtower
from tests.runtime.installation.hugging_face import KINDS, TAKES_FEATURES, inputs, make, tower
from tests.runtime.installation.test_hugging_face import OWN_ERROR, generate, logits

pytestmark = pytest.mark.gpu

Built = Callable[[str, str, str], Path]


def on_gpu(name: str, case: str, gpu: torch.device) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """Give a model in FP16 on the GPU, what it is asked, and its logits in FP32."""
    model = make(name)
    given = {key: value.to(gpu) for key, value in inputs(model, name, case).items()}
    exact = logits(model.to(gpu), given)
    return model.half(), given, exact


@pytest.mark.parametrize("case", ["one image", "several images", "tiles", "text"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_answers_are_within_the_models_own_error(
    name: str, case: str, gpu: torch.device, backend: str, built: Built
) -> None:
    if case == "tiles" and not KINDS[name].tiles:
        pytest.skip(f"{name} has no tiles")
    model, given, exact = on_gpu(name, case, gpu)
    eager = logits(model, given)
    own, said = (eager.float() - exact).abs().max(), generate(model, given)
    with trtower.install(model, built("clip", "fp16", backend), backend=backend) as installed:
        assert installed.tower.device == gpu
        found = logits(model, given)
        assert found.dtype == torch.float16
        assert (found.float() - exact).abs().max() <= OWN_ERROR * own
        assert generate(model, given) == said
    assert torch.equal(logits(model, given), eager)


def test_weights_leave_the_gpu_and_come_back(gpu: torch.device, backend: str, built: Built) -> None:
    model, given, _ = on_gpu("llava", "one image", gpu)
    eager = logits(model, given)
    weights = sum(each.nbytes for each in tower(model).parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(gpu)
    installed = trtower.install(model, built("clip", "fp16", backend), backend=backend)
    after = torch.cuda.memory_allocated(gpu)
    assert installed.freed >= weights
    assert before - after >= weights  # in torch's allocator, which the engine does not take from
    trtower.uninstall(model)
    assert torch.cuda.memory_allocated(gpu) - after >= weights
    assert torch.equal(logits(model, given), eager)


def test_bundle_follows_the_model_to_the_cpu_and_back(gpu: torch.device, backend: str, built: Built) -> None:
    del backend  # whichever `auto` takes
    model, given, exact = on_gpu("llava", "one image", gpu)
    given_at_home = {key: value.cpu() for key, value in given.items()}
    own = (logits(model.to("cpu"), given_at_home).float() - exact.cpu()).abs().max()
    model.to(gpu)
    with trtower.install(model, built("clip", "fp16", "onnxruntime-cuda")) as installed:
        there = logits(model, given)
        model.to("cpu")
        assert installed.tower.device.type == "cpu"
        assert tower(model).device.type == "cpu"
        assert (logits(model, given_at_home).float() - exact.cpu()).abs().max() <= OWN_ERROR * own
        model.to(gpu)
        assert installed.tower.device == gpu
        assert torch.equal(logits(model, given), there)


@pytest.mark.skipif(not TAKES_FEATURES, reason="generate of this transformers takes no features")
def test_features_are_encoded_on_the_gpu(gpu: torch.device, backend: str, built: Built) -> None:
    model, given, _ = on_gpu("llava_next", "tiles", gpu)
    said = generate(model, given)
    with trtower.install(model, built("clip", "fp16", backend), backend=backend):
        encoded = trtower.encode_for(model, given)
    assert all(each.device == gpu for each in encoded["image"].pooler_output)
    prompt = {key: given[key] for key in ("input_ids", "attention_mask")}
    assert generate(model, prompt, mm_encoder_outputs=encoded) == said
