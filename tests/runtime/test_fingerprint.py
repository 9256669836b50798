"""A tower is recognised in every dtype, and only by the weights that are read."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.conftest import MODELS, NUM_LAYERS, make_model
from trtower.dtypes import DTYPES
from trtower.fingerprint import hash_later, read_parameters, weights_sha256
from trtower.layer_codes import LAST, LayerCode
from trtower.spec import TowerSpec
from trtower_export.families import family_of
from trtower_export.graph.truncate import truncate


def spec_of(model: PreTrainedModel, layer: LayerCode = -2) -> TowerSpec:
    return family_of(model.config.model_type).spec(model.config, layer, "patch")


GRIDDED = {"siglip2"}
"""Families whose cut tower holds positions for its own grid, interpolated from those of the checkpoint."""


@pytest.mark.parametrize("layer", [0, -2, -1, LAST])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - GRIDDED))
def test_parameters_read_are_those_of_the_cut_tower(name: str, layer: LayerCode) -> None:
    model = make_model(name)
    spec = spec_of(model, layer)
    cut = truncate(model, family_of(model.config.model_type), spec)
    assert weights_sha256(read_parameters(model, spec)) == weights_sha256(cut.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tower_is_recognised_in_every_dtype(dtype: str) -> None:
    model = make_model("clip")
    spec = spec_of(model)
    known = hash_later(model, spec).result()
    assert len(set(known.values())) == 3
    held = make_model("clip").to(DTYPES[dtype])  # type: ignore[arg-type] # mypy misreads transformers' decorated `to`
    assert weights_sha256(read_parameters(held, spec), DTYPES[dtype]) == known[dtype]


def test_checkpoint_in_half_precision_is_recognised_in_fp32() -> None:
    half = make_model("clip").half()
    spec = spec_of(half)
    assert hash_later(half.float(), spec).result() == hash_later(make_model("clip").half(), spec).result()


def test_hash_follows_values_and_not_names() -> None:
    model = make_model("clip")
    spec = spec_of(model)
    renamed = nn.ModuleDict({"renamed": truncate(make_model("clip"), family_of("clip_vision_model"), spec)})
    assert weights_sha256(read_parameters(model, spec)) == weights_sha256(renamed.parameters())
    next(iter(renamed.parameters())).view(-1)[0] += 1e-3
    assert weights_sha256(read_parameters(model, spec)) != weights_sha256(renamed.parameters())


def test_dead_layers_and_heads_do_not_count_but_additions_do() -> None:
    model = make_model("siglip")
    spec = spec_of(model)
    known = hash_later(model, spec).result()
    vision = getattr(model, "vision_model", model)
    with torch.no_grad():
        vision.encoder.layers[NUM_LAYERS - 1].mlp.fc1.weight.zero_()
        vision.post_layernorm.weight.zero_()
        vision.head.probe.zero_()
    assert hash_later(model, spec).result() == known
    vision.encoder.layers[0].mlp.fc1.lora_A = nn.Linear(4, 4)
    assert hash_later(model, spec).result() != known


def test_weights_are_hashed_as_they_were_even_if_the_tower_is_cast_during_hashing() -> None:
    model = make_model("clip")
    spec = spec_of(model)
    known = hash_later(model, spec).result()
    begun = hash_later(model, spec)
    model.half()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert begun.result() == known


def test_process_that_ends_while_it_hashes_keeps_its_exit_code() -> None:
    """A thread that comes back from torch after Python's end aborts the process, in about one run of two."""
    program = """
import sys
from types import SimpleNamespace

import torch
from trtower.fingerprint import hash_later

tower = torch.nn.ParameterList(torch.zeros(3_000_000) for _ in range(64))
hash_later(tower, SimpleNamespace(reads=lambda name: True))
sys.exit(3)
"""
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
        assert (ended.returncode, ended.stderr) == (3, b"")
