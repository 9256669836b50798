"""Catch a layer that is off by one, and any bit that differs from transformers' tower."""

import hashlib
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import IMAGE_SIZE, MODELS, NUM_LAYERS, REFUSED, make_model
from trtower.layer_codes import LAST
from trtower_export.families import FAMILIES, Family, family_of
from trtower_export.graph.truncate import truncate

pytestmark = pytest.mark.usefixtures("one_thread")

UNNORMED = {name for name in MODELS if name.startswith(("clip", "metaclip_2", "internvl_vision"))} - {
    "internvl_vision-normed"
}
"""Towers whose `last_hidden_state` is state L itself: CLIP norms only its CLS token, InternVL only what it pools."""

SIZES = (28, 56, 98, 50, 64)
"""Smaller, larger, and much larger than IMAGE_SIZE; then a size with the same grid of patches, and one with another."""

ONE_SIZE, MULTIPLES = {"aimv2"}, {"siglip2"}
"""Towers that accept only the config's size, and towers that accept only multiples of the patch."""

RESIZES = [
    (name, size) for name in MODELS for size in SIZES if name not in ONE_SIZE and not (name in MULTIPLES and size % 14)
]


@cache
def load(name: str) -> tuple[nn.Module, Family]:
    model = make_model(name)
    return model, family_of(model.config.model_type)


@cache
def pixels(image_size: int) -> Tensor:
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(image_size))


@cache
@torch.no_grad()
def states(name: str, image_size: int = IMAGE_SIZE) -> tuple[Tensor, ...]:
    """Return transformers' own hidden states 0 to L, then `last_hidden_state`."""
    model, family = load(name)
    return family.read_states(model, pixels(image_size))


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().contiguous().numpy().tobytes()).hexdigest()


def test_every_family_is_here() -> None:
    elsewhere = REFUSED | {"prismatic"}  # a pair of others, in tests/export/checkpoint/test_prismatic.py
    assert {load(name)[1].name for name in MODELS} == {family.name for family in FAMILIES} - elsewhere
    assert all(load(family.name)[1] is family for family in FAMILIES if family.name not in elsewhere)


@pytest.mark.parametrize("layer", [*range(-NUM_LAYERS - 1, NUM_LAYERS + 1), LAST])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_layer_equals_transformers_exactly(name: str, layer: int | str) -> None:
    model, family = load(name)
    expected = states(name)
    index = NUM_LAYERS + 1 if layer == LAST else int(layer) % (NUM_LAYERS + 1)
    spec = family.spec(model.config, layer, "patch")
    found = truncate(model, family, spec)(pixels(IMAGE_SIZE))
    assert found.shape == (2, spec.num_tokens, spec.hidden_size)
    equal = {k for k, state in enumerate(expected) if torch.equal(found, state)}
    tied = {NUM_LAYERS, NUM_LAYERS + 1}
    assert equal == (tied if name in UNNORMED and index in tied else {index})


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_several_layers_are_concatenated_in_order(name: str) -> None:
    model, family = load(name)
    found = truncate(model, family, family.spec(model.config, [-2, 0, LAST, 1], "patch"))(pixels(IMAGE_SIZE))
    expected = states(name)
    assert torch.equal(found, torch.cat([expected[k] for k in (NUM_LAYERS - 1, 0, NUM_LAYERS + 1, 1)], dim=-1))


@pytest.mark.parametrize("layer", [0, 2, LAST])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_states_before_the_last_equal_transformers_exactly(name: str, layer: int | str) -> None:
    model, family = load(name)
    tower = truncate(model, family, family.spec(model.config, layer, "patch"))
    found = tower.states(pixels(IMAGE_SIZE))
    expected = states(name)[: len(found)]
    assert len(found) == len(tower.layers) + 1 + (tower.final_norm is not None)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(tower.read(found), tower(pixels(IMAGE_SIZE)))


@pytest.mark.parametrize(("name", "image_size"), RESIZES)
@torch.no_grad()
def test_another_image_size_equals_transformers_exactly(name: str, image_size: int) -> None:
    model, family = load(name)
    spec = family.spec(model.config, [*range(NUM_LAYERS + 1), LAST], "patch", image_size)
    assert (spec.image_size, spec.num_patches) == (image_size, (image_size // 14) ** 2)
    found = truncate(model, family, spec)(pixels(image_size))
    assert torch.equal(found, torch.cat(states(name, image_size), dim=-1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_model_stays_as_it_was(name: str) -> None:
    model = make_model(name)
    family = family_of(model.config.model_type)
    before = model.config.to_dict(), {key: digest(weight) for key, weight in model.state_dict().items()}
    truncate(model, family, family.spec(model.config, LAST, "patch", None if name in ONE_SIZE else 56))
    assert before == (model.config.to_dict(), {key: digest(weight) for key, weight in model.state_dict().items()})
    assert all(map(torch.equal, family.read_states(model, pixels(IMAGE_SIZE)), states(name)))
    assert before[0] == model.config.to_dict()


@pytest.mark.parametrize("layer", [0, 2, NUM_LAYERS, LAST])
@pytest.mark.parametrize("name", MODELS)
def test_a_tower_holds_only_what_its_layers_depend_on(name: str, layer: int | str) -> None:
    """Weights that autograd does not reach from transformers' state are dead: layers, mask tokens, heads, norms."""
    model, family = load(name)
    model.requires_grad_()  # cutting a tower earlier has turned it off
    spec = family.spec(model.config, layer, "patch")
    state = family.read_states(model, pixels(IMAGE_SIZE))[spec.layers[0]]
    weights = list(model.parameters())
    gradients = torch.autograd.grad(state.sum(), weights, allow_unused=True)
    alive = [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    assert spec.depth == NUM_LAYERS or len(alive) < len(weights)
    tower = truncate(model, family, spec)
    assert sorted(map(digest, tower.parameters())) == sorted(map(digest, alive))
    assert len(tower.layers) == spec.depth


@pytest.mark.parametrize("name", MODELS)
def test_prefix_tokens_come_first(name: str) -> None:
    model, family = load(name)
    one, other = states(name)[0]  # for two images
    prefix = family.spec(model.config, 0, "patch").num_prefix_tokens
    assert torch.equal(one[:prefix], other[:prefix])
    assert not any(map(torch.equal, one[prefix:], other[prefix:]))
    assert len({digest(token) for token in one[:prefix]}) == prefix
