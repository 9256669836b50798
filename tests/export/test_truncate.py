"""An off-by-one in the layer cannot survive these."""

from pathlib import Path

import pytest
import torch

from tests.conftest import IMAGE_SIZE, NUM_LAYERS
from trtower_export.checkpoint import open_checkpoint
from trtower_export.truncate import truncate, weights_sha256

FAMILIES = ("clip", "dinov2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", range(-NUM_LAYERS - 1, NUM_LAYERS + 1))
@torch.no_grad()
def test_every_layer_equals_transformers_exactly(checkpoints: dict[str, Path], family: str, layer: int) -> None:
    checkpoint = open_checkpoint(str(checkpoints[family]))
    model = checkpoint.load_model()
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    states = model(pixel_values, output_hidden_states=True).hidden_states
    assert len(states) == NUM_LAYERS + 1
    found = truncate(model, checkpoint.family, checkpoint.spec(layer, "patch"))(pixel_values)
    assert torch.equal(found, states[layer])
    others = [torch.equal(found, state) for state in states]
    assert sum(others) == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_several_layers_are_concatenated_in_order(checkpoints: dict[str, Path], family: str) -> None:
    checkpoint = open_checkpoint(str(checkpoints[family]))
    model = checkpoint.load_model()
    pixel_values = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    states = model(pixel_values, output_hidden_states=True).hidden_states
    found = truncate(model, checkpoint.family, checkpoint.spec([-2, 0, 1], "patch"))(pixel_values)
    assert torch.equal(found, torch.cat([states[-2], states[0], states[1]], dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_dead_layers_are_gone(checkpoints: dict[str, Path], family: str) -> None:
    checkpoint = open_checkpoint(str(checkpoints[family]))
    tower = truncate(checkpoint.load_model(), checkpoint.family, checkpoint.spec(-3, "patch"))
    assert len(tower.layers) == NUM_LAYERS - 2
    names = " ".join(name for name, _ in tower.named_parameters())
    assert "post_layernorm" not in names
    assert "layernorm.weight" not in names.replace("pre_layrnorm", "")
    assert "mask_token" not in names


def test_hash_follows_values_and_not_names(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    spec = checkpoint.spec(-2, "patch")
    tower = truncate(checkpoint.load_model(), checkpoint.family, spec)
    same = torch.nn.ModuleDict({"renamed": truncate(checkpoint.load_model(), checkpoint.family, spec)})
    assert weights_sha256(tower) == weights_sha256(same)
    next(iter(same.parameters())).view(-1)[0] += 1e-3
    assert weights_sha256(tower) != weights_sha256(same)
