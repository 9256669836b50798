"""LLaVA's model class builds a tower in its constructor, inside `from_pretrained`, while accelerate is active."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.runtime.installation.hugging_face import TEXT
from tests.runtime.tower.test_vision_tower import images
from trtower import CLIPVisionTowerS2, VisionTower, build_vision_tower

accelerate = pytest.importorskip("accelerate")

PROJECTED = int(TEXT["hidden_size"])
SPREAD = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
SPREAD |= {"model.mm_projector": "cpu", "lm_head": "cpu", "model.vision_tower": "cpu"}


class LlavaModel(transformers.LlamaModel):
    """LLaVA's `LlavaLlamaModel`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_tower = build_vision_tower(config, delay_load=config.delay_load)
        self.mm_projector = torch.nn.Linear(self.vision_tower.hidden_size, PROJECTED)


class Llava(transformers.LlamaForCausalLM):
    """LLaVA's `LlavaLlamaForCausalLM`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlavaModel(config)
        self.post_init()  # type: ignore[no-untyped-call]


@pytest.fixture(params=["one scale", "s2"])
def saved(request: pytest.FixtureRequest, fp32_bundle: Path, tmp_path: Path) -> Path:
    scales: dict[str, Any] = {"s2": True, "s2_scales": "42,84"} if request.param == "s2" else {}
    settings: dict[str, Any] = {"mm_vision_tower": str(fp32_bundle), "mm_vision_select_layer": -2, "delay_load": True}
    config = transformers.LlamaConfig(**TEXT, **settings, **scales)
    torch.manual_seed(1)
    Llava(config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def tower_of(model: Any) -> VisionTower:
    tower: VisionTower = model.model.vision_tower
    return tower


def assert_answers(model: Any, bundle: Path) -> None:
    """Load the tower as LLaVA's loader does, and compare it with one built outside a model."""
    tower = tower_of(model)
    if not tower.is_loaded:
        tower.load_model(device_map="auto")
    pixel_values = images(2)
    separate = build_vision_tower(model.config) if isinstance(tower, CLIPVisionTowerS2) else VisionTower.load(bundle)
    assert separate is not None
    assert torch.equal(tower(pixel_values), separate(pixel_values))
    assert tower.device == torch.device("cpu") == next(tower.parameters()).device
    assert model.model.mm_projector(tower(pixel_values)).shape[-1] == PROJECTED


@pytest.mark.parametrize("options", [
    {}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"},
    {"device_map": SPREAD}, {"device_map": SPREAD | {"model.layers": "disk"}},
    {"device_map": SPREAD | {"model.vision_tower": "disk"}},
], ids=str)  # fmt: skip
def test_from_pretrained_makes_a_model_whose_tower_runs(
    saved: Path, fp32_bundle: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    offload: dict[str, Any] = {"offload_folder": tmp_path / "offload"} if "disk" in str(options) else {}
    model = Llava.from_pretrained(saved, **options, **offload)
    assert_answers(model, fp32_bundle)
    tower_of(model).to(device="cpu", dtype=torch.float16)
    assert_answers(model, fp32_bundle)


def test_tower_that_loads_at_once_runs_too(saved: Path, fp32_bundle: Path) -> None:
    model = Llava.from_pretrained(saved, device_map={"": "cpu"}, delay_load=False)
    assert tower_of(model).is_loaded
    assert_answers(model, fp32_bundle)


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
@pytest.mark.parametrize("loaded", [False, True])
def test_offloading_leaves_the_tower_able_to_run(
    saved: Path, fp32_bundle: Path, tmp_path: Path, offload: Callable[..., Any], loaded: bool
) -> None:
    model = Llava.from_pretrained(saved)
    if loaded:
        tower_of(model).load_model()
    folder = (tmp_path / "offload",) if offload is accelerate.disk_offload else ()
    offload(model, *folder, execution_device=torch.device("cpu"))
    assert_answers_offloaded(model)
    tower_of(model).to("cpu")
    assert_answers(model, fp32_bundle)


def assert_answers_offloaded(model: Any) -> None:
    tower_of(model).load_model()
    assert torch.isfinite(model.model.mm_projector(tower_of(model)(images(1)))).all()


def test_model_without_memory_has_a_tower_that_can_be_placed(saved: Path, fp32_bundle: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(saved)
    with accelerate.init_empty_weights():
        model = Llava(config)
    assert not next(tower_of(model).parameters()).is_meta
    assert all(parameter.is_meta for parameter in model.model.mm_projector.parameters())
    model = accelerate.load_checkpoint_and_dispatch(model, str(saved), device_map={"": "cpu"})
    assert_answers(model, fp32_bundle)


def test_model_split_over_devices_is_dispatched(saved: Path, fp32_bundle: Path) -> None:
    model = Llava.from_pretrained(saved)
    sizes = {0: "1GB", "cpu": "1GB"}
    device_map = accelerate.infer_auto_device_map(
        model, max_memory=sizes, no_split_module_classes=["LlamaDecoderLayer"]
    )
    on_the_cpu = dict.fromkeys(device_map, "cpu")
    assert_answers(accelerate.dispatch_model(model, on_the_cpu), fp32_bundle)
    tower_of(model).close()
    tower_of(model).load_model(device_map={"model.vision_tower": "cpu", "model.layers.0": 0})
    assert_answers(model, fp32_bundle)


def test_saved_model_holds_nothing_of_the_tower(saved: Path) -> None:
    model = Llava.from_pretrained(saved)
    assert not [name for name in model.state_dict() if "vision_tower" in name]
    assert [name for name, _ in model.named_parameters() if "vision_tower" in name] == [
        "model.vision_tower._anchor.empty"
    ]


@pytest.mark.parametrize("loaded", [False, True])
def test_offloading_hooks_can_be_removed(saved: Path, fp32_bundle: Path, loaded: bool) -> None:
    model = Llava.from_pretrained(saved)
    if loaded:
        tower_of(model).load_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_answers(model, fp32_bundle)
