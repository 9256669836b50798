"""LLaVA, LLaVA-NeXT, VILA and tinychat answer as before, and so does every member of their wrappers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import trtower
from tests.conftest import IMAGE_SIZE, WIDTH, Bundles
from tests.runtime.installation.original import (
    IMAGE_TOKEN_INDEX,
    ClipWrapper,
    Llava,
    SiglipWrapper,
    Tinychat,
    Vila,
    config,
)
from tests.runtime.installation.test_hugging_face import EXACT, MATTERS, OWN_ERROR
from trtower.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

Checkpoints = dict[str, Path]


def llava(checkpoints: Checkpoints, **options: Any) -> Llava:
    args = config()
    return Llava(ClipWrapper(str(checkpoints["clip"]), args), args, **options)


def slices(checkpoints: Checkpoints) -> Llava:
    args = config(feature="slicefour_patch", layer=0)
    return Llava(ClipWrapper(str(checkpoints["clip"]), args), args)


def next_siglip(checkpoints: Checkpoints) -> Llava:
    return Llava(SiglipWrapper(str(checkpoints["siglip"])), config())


def tinychat(checkpoints: Checkpoints, layer: int = -2) -> Tinychat:
    args = config(layer)
    model = Tinychat(ClipWrapper(str(checkpoints["clip"]), args), args)
    if abs(layer) > 100:
        model.model.mm_projector = torch.nn.Linear(2 * WIDTH, WIDTH)
    return model


def vila(checkpoints: Checkpoints) -> Vila:
    args = config()
    return Vila(ClipWrapper(str(checkpoints["clip"]), args), args)


MODELS: dict[str, tuple[Callable[[Checkpoints], Any], str, Any]] = {
    "llava": (llava, "clip", -2),
    "llava under fsdp": (lambda checkpoints: llava(checkpoints, fsdp=True), "clip", -2),
    "llava-next with slices": (slices, "clip", [1, 2, 3, 4]),
    "llava-next with siglip": (next_siglip, "siglip", -2),
    "vila": (vila, "clip", -2),
    "tinychat": (tinychat, "clip", -2),
    "tinychat with two layers in one": (lambda checkpoints: tinychat(checkpoints, -201), "clip", [1, -2]),
}
"""Name -> how to make it, its tower, and the layers that it reads."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def make_inputs(case: str, seed: int = 0) -> dict[str, Any]:
    image = IMAGE_TOKEN_INDEX
    ids = {"text": [1, 5, 7], "one image": [1, image, 5, 7]}.get(case, [1, image, 5, image, 7])
    images = {
        "text": None,
        "one image": draw(1, seed=seed),
        "several images": draw(2, seed=seed),
        "tiles of one number": draw(2, 3, seed=seed),
        "tiles of several numbers": [draw(5, seed=seed), draw(1, seed=seed)],
    }[case]
    return {"input_ids": torch.tensor([ids]), "images": images}


CASES = ("text", "one image", "several images", "tiles of one number", "tiles of several numbers")


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits


def make(name: str, checkpoints: Checkpoints) -> Any:
    torch.manual_seed(5)
    return MODELS[name][0](checkpoints).eval()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_answers_in_fp32_are_those_of_the_eager_tower(
    name: str, case: str, checkpoints: Checkpoints, bundles: Bundles
) -> None:
    model, (_, tower, layer) = make(name, checkpoints), MODELS[name]
    inputs = make_inputs(case)
    before, expected = logits(model, inputs), model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert case == "text" or (logits(model, make_inputs(case, seed=1)) - before).abs().max() > MATTERS
    with trtower.install(model, bundles(tower, layer)):
        assert (logits(model, inputs) - before).abs().max() <= EXACT
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("name", MODELS)
def test_answers_in_fp16_are_within_the_eager_towers_error(
    name: str, checkpoints: Checkpoints, bundles: Bundles
) -> None:
    model, (_, tower, layer) = make(name, checkpoints), MODELS[name]
    inputs = make_inputs("several images")
    exact = logits(model, inputs)
    model.half()
    model.get_vision_tower().half()  # the model does not cast a wrapper in a list, as under FSDP
    half = inputs | {"images": inputs["images"].half()}
    own = (logits(model, half).float() - exact).abs().max()
    with trtower.install(model, bundles(tower, layer, "fp16")):
        actual = logits(model, half)
        assert actual.dtype == torch.float16
        assert (actual.float() - exact).abs().max() <= OWN_ERROR * own


def members(wrapper: Any) -> dict[str, Any]:
    actual = {name: getattr(wrapper, name) for name in MEMBERS}
    return actual | {"config": actual["config"].to_dict(), "image_processor": actual["image_processor"]}


MEMBERS = (
    "is_loaded",
    "vision_tower_name",
    "select_layer",
    "select_feature",
    "image_processor",
    "dtype",
    "device",
    "config",
    "hidden_size",
    "num_patches",
    "num_patches_per_side",
)


def test_every_member_of_the_wrapper_answers_as_before(checkpoints: Checkpoints, bundles: Bundles) -> None:
    model = make("llava", checkpoints)
    wrapper = model.get_vision_tower()
    before, inner = members(wrapper), wrapper.vision_tower
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    listed = wrapper([draw(), draw(seed=1)])
    with trtower.install(model, bundles()):
        assert model.get_vision_tower() is wrapper
        assert members(wrapper) == before
        assert wrapper.dummy_feature.shape == (1, WIDTH)
        assert not wrapper.dummy_feature.any()
        wrapper.load_model()
        stand_in = wrapper.vision_tower
        assert isinstance(stand_in, transformers.CLIPVisionModel)
        assert stand_in is not inner
        assert not any(each.requires_grad for each in wrapper.parameters())
        assert next(iter(wrapper.parameters())).dtype == torch.float32
        assert wrapper.requires_grad_(False) is wrapper
        assert wrapper.eval() is wrapper
        actual = wrapper([draw(), draw(seed=1)])
        assert [each.shape for each in actual] == [(1, 9, WIDTH)] * 2
        for one, other in zip(actual, listed, strict=True):
            assert torch.allclose(one, other, atol=EXACT)
        saved = model.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
        casts: tuple[Callable[[], Any], ...] = (
            lambda: wrapper.half(),
            lambda: wrapper.to(dtype=torch.bfloat16),
            lambda: wrapper.float(),
        )
        for cast in casts:
            assert cast() is wrapper
            assert wrapper(draw(1)).dtype == torch.float32
            assert wrapper.dtype == next(iter(wrapper.parameters())).dtype
            assert stand_in(draw(1), output_hidden_states=True).hidden_states[-2].dtype == wrapper.dtype
    assert wrapper.vision_tower is inner


def test_wrapper_may_be_cast_before_every_call_as_tinychat_does(checkpoints: Checkpoints, bundles: Bundles) -> None:
    model = make("llava", checkpoints)
    with trtower.install(model, bundles()):
        once = model.get_vision_tower().half()(draw(1))
        assert torch.equal(model.get_vision_tower().half()(draw(1)), once)
    assert model.get_vision_tower().dtype == torch.float16  # the last cast stays
    assert model.get_vision_tower().vision_tower.dtype == torch.float16


def test_vila_saves_the_tower_that_was_replaced(checkpoints: Checkpoints, bundles: Bundles, tmp_path: Path) -> None:
    model = make("vila", checkpoints)
    state = model.vision_tower.vision_tower.state_dict()
    state = {name: tensor.clone() for name, tensor in state.items()}
    with trtower.install(model, bundles()):
        model.save_pretrained(tmp_path)
    saved = transformers.CLIPVisionModel.from_pretrained(tmp_path / "vision_tower")
    assert saved.config.architectures == ["CLIPVisionModel"]
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in state.items())


def test_tower_in_a_list_without_a_wrapper(checkpoints: Checkpoints, bundles: Bundles) -> None:
    model = make("llava", checkpoints)
    inner = model.get_vision_tower().vision_tower
    del model.model.vision_tower
    model.model.vision_tower = [inner]  # as in the first LLaVA
    exact = inner(draw(1), output_hidden_states=True).hidden_states[-2]
    with trtower.install(model, bundles()) as installed:
        assert installed.path == "model.vision_tower[0]"
        actual = model.model.vision_tower[0](draw(1), output_hidden_states=True).hidden_states[-2]
        assert torch.allclose(actual, exact, atol=EXACT)
    assert model.model.vision_tower[0] is inner


def test_delayed_tower_must_be_loaded_first(checkpoints: Checkpoints, bundles: Bundles) -> None:
    args = config()
    model = Llava(ClipWrapper(str(checkpoints["clip"]), args, delay_load=True), args)
    with pytest.raises(
        ConfigError, match=r"ClipWrapper that is not loaded: call get_vision_tower\(\)\.load_model\(\) first"
    ):
        trtower.install(model, bundles())


def test_model_with_a_compiled_tower_is_refused(checkpoints: Checkpoints, bundles: Bundles) -> None:
    model = make("llava", checkpoints)
    model.model.vision_tower = trtower.CLIPVisionTower(bundles(), config())
    with pytest.raises(ConfigError, match=r"already has a compiled tower, at model\.vision_tower"):
        trtower.install(model, bundles())


@pytest.mark.parametrize("name", ["llava", "llava-next with siglip", "tinychat"])
def test_other_layer_is_refused(name: str, checkpoints: Checkpoints, bundles: Bundles) -> None:
    model = make(name, checkpoints)
    before = model.state_dict().keys()
    with pytest.raises(
        ConfigError,
        match=r"hidden state 3 of \d layers; .* holds 2\. Export a bundle with it: trtower export .*=(-2|3)",
    ):
        trtower.install(model, bundles(MODELS[name][1], 2))
    assert model.state_dict().keys() == before


def test_slices_need_every_layer(checkpoints: Checkpoints, bundles: Bundles) -> None:
    with pytest.raises(ConfigError, match=r"select_layer=0 under slicefour_patch, hidden state 1, 2, 3, 4 of 4 layers"):
        trtower.install(make("llava-next with slices", checkpoints), bundles())
