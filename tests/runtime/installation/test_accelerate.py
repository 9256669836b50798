"""Models that accelerate spread over devices and disk, or that were loaded in another dtype."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import trtower
from tests.conftest import Bundles
from tests.runtime.installation.hugging_face import inputs, make, tower
from tests.runtime.installation.test_hugging_face import EXACT, generate, logits
from trtower.errors import ConfigError

accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning"),
]


def spread(language_model: str, vision_tower: str) -> dict[str, str]:
    places = {"model.language_model": language_model, "model.vision_tower": vision_tower}
    return places | {"model.multi_modal_projector": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    make("llava").save_pretrained(folder)
    return folder


def load(saved: Path, tmp_path: Path, **options: Any) -> Any:
    model_class = transformers.LlavaForConditionalGeneration
    return model_class.from_pretrained(saved, offload_folder=tmp_path / "offload", **options)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", spread("disk", "cpu")], ids=str)
def test_answers_are_the_same_under_a_device_map(
    saved: Path, tmp_path: Path, bundles: Bundles, device_map: Any
) -> None:
    model = load(saved, tmp_path, device_map=device_map)
    given = inputs(model, "llava", "one image")
    before, expected = logits(model, given), generate(model, given)
    eager, hooked = tower(model), hasattr(tower(model), "_hf_hook")
    with trtower.install(model, bundles()):
        assert (logits(model, given) - before).abs().max() <= EXACT
        assert generate(model, given) == expected
        assert not hasattr(tower(model), "_hf_hook")
    assert tower(model) is eager
    assert hasattr(eager, "_hf_hook") == hooked
    assert torch.equal(logits(model, given), before)


def test_tower_that_is_offloaded_is_refused(saved: Path, tmp_path: Path, bundles: Bundles) -> None:
    model = load(saved, tmp_path, device_map=spread("cpu", "disk"))
    eager = tower(model)
    with pytest.raises(ConfigError, match="is on the meta device: accelerate has offloaded the weights"):
        trtower.install(model, bundles())
    assert tower(model) is eager


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_is_recognised_in_the_dtype_it_was_loaded_in(
    saved: Path, tmp_path: Path, bundles: Bundles, dtype: torch.dtype
) -> None:
    model = load(saved, tmp_path, torch_dtype=dtype)
    with trtower.install(model, bundles(precision="fp16")):
        assert tower(model).dtype == dtype
        assert logits(model, inputs(make("llava"), "llava", "one image")).dtype == dtype


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_model_that_is_offloaded_after_installing_answers_and_is_whole_again(
    saved: Path, tmp_path: Path, bundles: Bundles, offload: Callable[..., Any]
) -> None:
    model = load(saved, tmp_path)
    given = inputs(model, "llava", "one image")
    before, eager = logits(model, given), tower(model)
    with trtower.install(model, bundles()):
        folder = (tmp_path / "again",) if offload is accelerate.disk_offload else ()
        offload(model, *folder, execution_device=torch.device("cpu"))
        assert (logits(model, given) - before).abs().max() <= EXACT
        tower(model).to("cpu")
    assert tower(model) is eager
    assert not any(parameter.is_meta for parameter in eager.parameters())
    assert torch.equal(logits(model, given), before)
