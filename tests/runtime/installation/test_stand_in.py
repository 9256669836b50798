"""The stand-in answers like the vision model whose class it shares, or says what it lacks."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import trtower
from tests.conftest import IMAGE_SIZE, NUM_LAYERS, WIDTH, Bundles, make_model
from tests.runtime.installation.hugging_face import inputs, make, tower
from tests.runtime.installation.test_hugging_face import EXACT, logits
from trtower.errors import BackendError, ConfigError, InputError
from trtower.layer_codes import LAST, LayerCode

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = [1, -2]


class Holder(nn.Module):
    """A model that has a tower and reads nothing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tower = make_model(name)


Install = Callable[..., tuple[Any, Any]]


@pytest.fixture
def install(bundles: Bundles) -> Iterator[Install]:
    """Return a function that makes the stand-in of a small tower, and the same tower eagerly."""
    installed = []

    def put(name: str = "clip", layer: LayerCode = LAYERS, **options: Any) -> tuple[Any, Any]:
        holder = Holder(name).eval()
        installed.append(trtower.install(holder, bundles(name, layer), **options))
        return holder.tower, make_model(name)

    yield put
    for each in installed:
        each.uninstall()


def draw(batch: int = 2, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(**options)


@torch.no_grad()
def states(eager: Any, pixel_values: torch.Tensor) -> Any:
    return eager(pixel_values, output_hidden_states=True).hidden_states


def test_states_are_those_of_the_eager_tower(install: Install) -> None:
    stand_in, eager = install()
    expected = states(eager, draw())
    output = stand_in(draw(), output_hidden_states=True)
    assert len(output.hidden_states) == len(expected) == NUM_LAYERS + 1
    for index in (1, 3, -2, -4):
        assert torch.allclose(output.hidden_states[index], expected[index], atol=EXACT)
    assert len(output.hidden_states[1:2]) == 1


@pytest.mark.parametrize("index", [0, 2, 4, -1, -3, -5])
def test_state_that_is_not_held_raises_with_its_number(install: Install, index: int) -> None:
    stand_in, _ = install()
    output = stand_in(draw(), output_hidden_states=True)
    layer = index % (NUM_LAYERS + 1)
    with pytest.raises(
        ConfigError,
        match=rf"hidden state {layer} of 4 layers was requested, .* contains only 1, 3\. .* export .*=1,3,{layer} ",
    ):
        output.hidden_states[index]
    with pytest.raises(ConfigError, match=r"hidden state \d of 4 layers was requested"):
        output.hidden_states[0:3]
    with pytest.raises(IndexError):
        output.hidden_states[5]


@pytest.mark.parametrize("layers", [1, -2, [1], [-2, 1], (3,)])
def test_layers_can_be_requested_by_number(install: Install, layers: Any) -> None:
    stand_in, eager = install()
    expected = states(eager, draw())
    output = stand_in(draw(), output_hidden_states=layers)
    for index in [layers] if isinstance(layers, int) else layers:
        assert torch.allclose(output.hidden_states[index], expected[index], atol=EXACT)


@pytest.mark.parametrize(("layers", "layer"), [(2, 2), ([1, 2], 2), (-1, 4)])
def test_layers_that_are_not_held_raise_when_they_are_read(install: Install, layers: Any, layer: int) -> None:
    stand_in, _ = install()
    output = stand_in(draw(), output_hidden_states=layers)  # InternVL requests -1 and reads last_hidden_state
    with pytest.raises(ConfigError, match=rf"hidden state {layer} of 4 layers was requested"):
        output.hidden_states[layer]


def test_states_are_returned_if_the_call_or_the_config_requests_them(install: Install) -> None:
    stand_in, _ = install()
    assert stand_in(draw()).hidden_states is None
    assert stand_in(draw(), output_hidden_states=False).hidden_states is None
    stand_in.config.output_hidden_states = True
    assert stand_in(draw()).hidden_states is not None
    assert stand_in(draw(), output_hidden_states=False).hidden_states is None


def test_states_are_a_tuple_if_all_are_held(install: Install) -> None:
    stand_in, eager = install(layer=[0, 1, 2, 3, 4])
    found = stand_in(draw(), output_hidden_states=True).hidden_states
    assert torch.allclose(torch.stack(found), torch.stack(states(eager, draw())), atol=EXACT)


def test_models_can_assign_to_the_output(install: Install) -> None:
    stand_in, _ = install()
    output = stand_in(draw(), output_hidden_states=True)
    assert type(output) is transformers.modeling_outputs.BaseModelOutputWithPooling
    assert "pooler_output, one vector per image, was requested" in repr(output)
    output.pooler_output = [torch.ones(3)]  # type: ignore[assignment] # models do so too
    assert output.pooler_output[0].sum() == output["pooler_output"][0].sum() == 3
    assert output.attentions is None


USES: dict[str, Callable[[Any], Any]] = {
    "slice": lambda state: state[:, 1:],
    "cast": lambda state: state.to(torch.float16),
    "shape": lambda state: state.shape,
    "concatenate": lambda state: torch.cat([torch.zeros(2, 10, WIDTH), state]),
    "project": lambda state: nn.functional.linear(state, torch.eye(WIDTH)),
    "add to": lambda state: torch.zeros(1) + state,
    "multiply": lambda state: 2 * state,
    "ask": lambda state: bool(state.any()),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_absent_output_can_be_passed_on_but_not_used(install: Install, use: Callable[[Any], Any]) -> None:
    stand_in, _ = install()
    given = stand_in(draw(), output_hidden_states=True)
    for output in (given, type(given)(dict(given.items())), pickle.loads(pickle.dumps(given))):
        first, second, *_ = type(output.hidden_states)(state for state in output.hidden_states)
        assert use(second) is not None
        with pytest.raises(ConfigError, match=r"hidden state 0 of 4 layers was requested, .* contains only 1, 3"):
            use(first)
        for last in (output.last_hidden_state, output[0], output["last_hidden_state"], output.to_tuple()[0]):
            with pytest.raises(
                ConfigError, match=r"last_hidden_state was requested, .* --select-layer=1,3,last_hidden_state "
            ):
                use(last)
        for pooled in (output.pooler_output, output[1]):
            with pytest.raises(ConfigError, match="pooler_output, one vector per image, was requested"):
                use(pooled)


def test_tuple_has_the_order_of_the_eager_tower(install: Install) -> None:
    stand_in, _ = install()
    found = stand_in(draw(), return_dict=False, output_hidden_states=True)
    assert [type(each).__name__ for each in found] == ["Absent", "Absent", "Held"]
    assert len(found[2]) == NUM_LAYERS + 1
    stand_in.config.return_dict = False
    assert isinstance(stand_in(draw()), tuple)
    assert not isinstance(stand_in(draw(), return_dict=True), tuple)


def test_normed_state_is_last_hidden_state_but_not_a_hidden_state(install: Install) -> None:
    stand_in, eager = install("siglip", LAST)
    with torch.no_grad():
        expected = eager(draw()).last_hidden_state
    output = stand_in(draw(), output_hidden_states=True)
    assert torch.allclose(output.last_hidden_state, expected, atol=EXACT)
    assert torch.allclose(output[0], expected, atol=EXACT)
    with pytest.raises(
        ConfigError, match=r"hidden state 4 of 4 layers was requested, .* contains only last_hidden_state"
    ):
        output.hidden_states[-1]


@pytest.mark.parametrize("layer", [LAST, -1])
def test_last_state_of_clip_has_two_names(install: Install, layer: LayerCode) -> None:
    stand_in, eager = install("clip", layer)
    expected = states(eager, draw())[-1]
    output = stand_in(draw(), output_hidden_states=True)
    assert torch.allclose(output.last_hidden_state, expected, atol=EXACT)
    assert torch.allclose(output.hidden_states[-1], expected, atol=EXACT)


@pytest.mark.parametrize("value", [None, False, True])
def test_positions_need_no_interpolation(install: Install, value: Any) -> None:
    stand_in, eager = install()
    with torch.no_grad():
        expected = eager(draw(), output_hidden_states=True, interpolate_pos_encoding=bool(value)).hidden_states[1]
    found = stand_in(draw(), output_hidden_states=True, interpolate_pos_encoding=value).hidden_states[1]
    assert torch.allclose(found, expected, atol=EXACT)


@pytest.mark.parametrize("option", ["output_attentions", "attention_mask", "bool_masked_pos"])
def test_options_that_change_the_tower_are_refused(install: Install, option: str) -> None:
    stand_in, _ = install()
    with pytest.raises(ConfigError, match=rf"tower is compiled and does not support {option}: trtower\.uninstall"):
        stand_in(draw(), **{option: torch.ones(1)})
    assert stand_in(draw(), **{option: None}, vision_aspect_ratio="anyres_max_9") is not None


@pytest.mark.parametrize(
    ("pixel_values", "words"),
    [
        (None, "pixel_values is a NoneType"),
        (
            torch.zeros(3, 42, 42),
            r"pixel_values has shape \(3, 42, 42\); this engine accepts a tensor \(B, 3, 42, 42\)",
        ),
        (torch.zeros(1, 2, 3, 42, 42), r"pixel_values has shape \(1, 2, 3, 42, 42\)"),
        (
            torch.zeros(1, 3, 56, 56),
            r"pixel_values has shape \(1, 3, 56, 56\); this engine accepts a tensor \(B, 3, 42, 42\)",
        ),
        (torch.zeros(1, 3, 42, 42, dtype=torch.uint8), "has dtype torch.uint8"),
        (torch.full((1, 3, 42, 42), float("nan")), "NaN or infinite"),
    ],
)
def test_other_pixels_are_refused(install: Install, pixel_values: Any, words: str) -> None:
    stand_in, _ = install()
    with pytest.raises(InputError, match=words):
        stand_in(pixel_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_states_have_the_dtype_of_the_tower_not_of_the_pixels(install: Install, dtype: torch.dtype) -> None:
    stand_in, eager = install()
    stand_in.to(dtype)
    expected = states(eager, draw())[1]
    for given in (torch.float32, torch.float16, torch.bfloat16):
        found = stand_in(draw(dtype=given), output_hidden_states=1).hidden_states[1]
        assert found.dtype == dtype
        assert torch.allclose(found.float(), expected, atol=0.1)


def test_training_is_refused(install: Install) -> None:
    stand_in, _ = install()
    stand_in.train()
    with pytest.raises(BackendError, match=r"tower is compiled and cannot be trained: call model\.eval\(\)"):
        stand_in(draw())
    assert stand_in.eval()(draw()) is not None


def test_gradients_are_refused(bundles: Bundles) -> None:
    model = make("llava")
    given = inputs(model, "llava", "one image")
    with trtower.install(model, bundles()):
        loss = model(**given).logits.sum()
        with pytest.raises(BackendError, match=r"a gradient reached the vision tower, .*requires_grad_\(False\)"):
            loss.backward()
        wants = {**given, "pixel_values": given["pixel_values"].clone().requires_grad_()}
        with pytest.raises(BackendError, match="pixel_values requires a gradient, which no engine computes"):
            model(**wants)
        with torch.no_grad():
            assert not model(**wants).logits.requires_grad
        with torch.inference_mode():
            assert model(**given).logits.is_inference()


def test_model_around_a_frozen_tower_is_trained_as_before(bundles: Bundles) -> None:
    model = make("llava")
    tower(model).requires_grad_(False)
    given = inputs(model, "llava", "one image")
    weight = model.model.multi_modal_projector.linear_1.weight
    model(**given).logits.sum().backward()
    expected = weight.grad.clone()
    model.zero_grad()
    with trtower.install(model, bundles()):
        model.train()
        tower(model).eval()
        model(**given).logits.sum().backward()
        assert torch.allclose(weight.grad, expected, rtol=1e-2, atol=1e-3)
        assert not tower(model).anchor.empty.requires_grad


def test_parts_of_the_eager_tower_raise_with_advice(install: Install) -> None:
    stand_in, eager = install()
    part = next(iter(eager._modules))
    with pytest.raises(AttributeError, match=rf"tower\.{part} is a part of the eager tower, .*uninstall\(model\)"):
        getattr(stand_in, part)
    assert not hasattr(stand_in, "no_such_part")
    assert type(stand_in).__name__ == type(eager).__name__
    assert isinstance(stand_in, type(eager))
    assert stand_in.config.hidden_size == WIDTH


def test_hidden_states_of_the_language_model_can_be_requested(bundles: Bundles) -> None:
    model = make("llava")
    given = inputs(model, "llava", "one image")
    with torch.no_grad():
        expected = model(**given, output_hidden_states=True).hidden_states[-1]
        with trtower.install(model, bundles()):
            found = model(**given, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(found, expected, atol=EXACT)


def test_call_with_another_layer_raises_with_its_number(bundles: Bundles) -> None:
    model = make("llava")
    given = inputs(model, "llava", "one image")
    with trtower.install(model, bundles()):
        with pytest.raises(ConfigError, match=r"hidden state (-1|4) of 4 layers was requested, .* contains only 3"):
            model(**given, vision_feature_layer=-1)
        assert logits(model, given) is not None


def test_hooks_on_the_tower_are_still_called(bundles: Bundles) -> None:
    holder = Holder("clip").eval()
    heard: list[Any] = []
    holder.tower.register_forward_hook(lambda module, arguments, output: heard.append(output))
    holder.tower.register_forward_pre_hook(lambda module, arguments: heard.append(arguments))
    with trtower.install(holder, bundles()):
        output = holder.tower(draw())
        assert heard[1] is output
        later = holder.tower.register_forward_hook(lambda module, arguments, output: heard.append("later"))
        holder.tower(draw())
        assert heard.pop() == "later"
    holder.tower(draw())
    assert heard.pop() == "later"
    later.remove()
