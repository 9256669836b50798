"""A bundle replaces the tower that the model calls, and no other."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import trtower
from tests.conftest import Bundles
from tests.runtime.installation.hugging_face import inputs, make, tower
from tests.runtime.installation.original import draw_llava, draw_vila
from tests.runtime.installation.test_hugging_face import EXACT, logits
from trtower.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def with_adapter(**options: Any) -> Any:
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", **options)
    return peft.get_peft_model(make("llava"), config).eval().requires_grad_(requires_grad=False)


def test_copy_that_peft_trains_is_the_one_that_is_replaced(bundles: Bundles) -> None:
    model = with_adapter(modules_to_save=["vision_tower"])
    wrapper = model.base_model.model.model.vision_tower
    copy, original = wrapper.modules_to_save["default"], wrapper.original_module
    given = inputs(model.base_model.model, "llava", "one image")
    before, calls = logits(model, given), list[object]()
    with trtower.install(model, bundles()) as installed:
        assert installed.path.endswith("vision_tower.modules_to_save.default")
        installed.tower.on_batch = calls.append
        assert (logits(model, given) - before).abs().max() <= EXACT
        assert calls
        assert wrapper.original_module is original
        with model.disable_adapter():  # PEFT now calls the original
            calls.clear()
            logits(model, given)
            assert not calls
    assert wrapper.modules_to_save["default"] is copy
    assert torch.equal(logits(model, given), before)


def test_copy_that_peft_does_not_call_is_not_offered(bundles: Bundles) -> None:
    model = with_adapter(modules_to_save=["vision_tower"])
    unused = "base_model.model.model.vision_tower.original_module"
    with pytest.raises(ConfigError, match=r"no vision tower at '.*original_module'; it has .*modules_to_save\.default"):
        trtower.install(model, bundles(), tower=unused)
    with model.disable_adapter(), trtower.install(model, bundles()) as installed:
        assert installed.path == unused


def test_adapter_outside_the_tower_does_not_matter(bundles: Bundles) -> None:
    model = with_adapter()
    given = inputs(model.base_model.model, "llava", "one image")
    before = logits(model, given)
    with trtower.install(model, bundles()):
        assert (logits(model, given) - before).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "vipllava", "paligemma"])
def test_every_model_is_proven_to_call_its_tower(bundles: Bundles, name: str, caplog: pytest.LogCaptureFixture) -> None:
    from tests.runtime.installation.hugging_face import KINDS

    kind = KINDS[name]
    trtower.install(make(name), bundles(kind.tower, kind.layer))
    assert "could not prove" not in caplog.text


@pytest.mark.parametrize("draw", [draw_llava, draw_vila])
def test_every_wrapper_is_proven_to_call_its_tower(
    draw: Any, bundles: Bundles, checkpoints: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    trtower.install(draw(str(checkpoints["clip"])), bundles())
    assert "could not prove" not in caplog.text


def test_model_that_bypasses_forward_is_refused(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llava")
    eager = tower(model)

    def layers_alone(pixel_values: torch.Tensor, **_: Any) -> torch.Tensor:
        inside = getattr(eager, "vision_model", eager)
        return inside.embeddings(pixel_values)

    monkeypatch.setattr(model, "get_image_features", layers_alone)
    monkeypatch.setattr(model.model, "get_image_features", layers_alone)
    with pytest.raises(ConfigError, match=r"get_image_features runs without calling model\.vision_tower"):
        trtower.install(model, bundles())
    assert tower(model) is eager


def test_model_with_unknown_methods_is_installed_with_a_warning(
    bundles: Bundles, caplog: pytest.LogCaptureFixture
) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eyes = tower(make("llava"))

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.eyes(batch["camera"]).last_hidden_state

    trtower.install(Policy().eval(), bundles())
    assert "Policy: could not prove that it calls eyes" in caplog.text
    assert "on_batch" in caplog.text


def test_model_that_calls_forward_itself_is_proven_without_running_hooks(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, heard = make("llava"), list[object]()
    eager = tower(model)
    eager.register_forward_pre_hook(lambda *given: heard.append(given))
    monkeypatch.setattr(
        model, "get_image_features", lambda pixel_values: tower(model).forward(pixel_values).last_hidden_state
    )
    trtower.install(model, bundles())
    assert "could not prove" not in caplog.text
    assert not heard
    trtower.uninstall(model)
    assert "forward" not in vars(eager)


def test_method_that_is_not_written_in_python_is_skipped(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llava")
    monkeypatch.setattr(model, "get_image_features", max)
    assert trtower.install(model, bundles()).is_installed


def test_named_tower_is_installed_even_if_the_model_does_not_call_it(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llava")
    for each in (model, model.model):
        monkeypatch.setattr(each, "get_image_features", lambda pixel_values: pixel_values)
    with pytest.raises(ConfigError, match=r"Install it nevertheless with tower='model\.vision_tower'"):
        trtower.install(model, bundles())
    trtower.install(model, bundles(), tower="model.vision_tower")
    assert "could not prove" in caplog.text
