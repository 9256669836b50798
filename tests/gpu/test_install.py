"""A bundle in a model on a GPU: same answers, memory freed, and moves to the CPU and back."""

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
    """Return a model in FP16 on the GPU, a prompt for it, and its FP32 logits for the prompt."""
    model = make(name)
    prompt = {key: value.to(gpu) for key, value in inputs(model, name, case).items()}
    exact = logits(model.to(gpu), prompt)
    return model.half(), prompt, exact


@pytest.mark.parametrize("case", ["one image", "several images", "tiles", "text"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_answers_are_within_the_models_own_error(
    name: str, case: str, gpu: torch.device, backend: str, built: Built
) -> None:
    if case == "tiles" and not KINDS[name].tiles:
        pytest.skip(f"{name} has no tiles")
    model, prompt, exact = on_gpu(name, case, gpu)
    eager = logits(model, prompt)
    own_error, answer = (eager.float() - exact).abs().max(), generate(model, prompt)
    with trtower.install(model, built("clip", "fp16", backend), backend=backend) as installed:
        assert installed.tower.device == gpu
        compiled = logits(model, prompt)
        assert compiled.dtype == torch.float16
        assert (compiled.float() - exact).abs().max() <= OWN_ERROR * own_error
        assert generate(model, prompt) == answer
    assert torch.equal(logits(model, prompt), eager)


def test_weights_leave_the_gpu_and_come_back(gpu: torch.device, backend: str, built: Built) -> None:
    model, prompt, _ = on_gpu("llava", "one image", gpu)
    eager = logits(model, prompt)
    weights = sum(each.nbytes for each in tower(model).parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(gpu)
    installed = trtower.install(model, built("clip", "fp16", backend), backend=backend)
    after = torch.cuda.memory_allocated(gpu)
    assert installed.freed >= weights
    assert before - after >= weights  # in torch's allocator, which the engine does not use
    trtower.uninstall(model)
    assert torch.cuda.memory_allocated(gpu) - after >= weights
    assert torch.equal(logits(model, prompt), eager)


def test_bundle_follows_the_model_to_the_cpu_and_back(gpu: torch.device, backend: str, built: Built) -> None:
    del backend  # install uses `auto`
    model, prompt, exact = on_gpu("llava", "one image", gpu)
    prompt_on_cpu = {key: value.cpu() for key, value in prompt.items()}
    own = (logits(model.to("cpu"), prompt_on_cpu).float() - exact.cpu()).abs().max()
    model.to(gpu)
    with trtower.install(model, built("clip", "fp16", "onnxruntime-cuda")) as installed:
        there = logits(model, prompt)
        model.to("cpu")
        assert installed.tower.device.type == "cpu"
        assert tower(model).device.type == "cpu"
        assert (logits(model, prompt_on_cpu).float() - exact.cpu()).abs().max() <= OWN_ERROR * own
        model.to(gpu)
        assert installed.tower.device == gpu
        assert torch.equal(logits(model, prompt), there)


@pytest.mark.skipif(not TAKES_FEATURES, reason="generate() of this transformers release accepts no features")
def test_features_are_encoded_on_the_gpu(gpu: torch.device, backend: str, built: Built) -> None:
    model, prompt, _ = on_gpu("llava_next", "tiles", gpu)
    answer = generate(model, prompt)
    with trtower.install(model, built("clip", "fp16", backend), backend=backend):
        encoded = trtower.encode_for(model, prompt)
    assert all(each.device == gpu for each in encoded["image"].pooler_output)
    text = {key: prompt[key] for key in ("input_ids", "attention_mask")}
    assert generate(model, text, mm_encoder_outputs=encoded) == answer
