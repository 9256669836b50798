"""The reported cost of a cut is true: full towers are counted in PyTorch, cut ones in the file, and both agree."""

import gc
import weakref
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from torch import nn

from tests.conftest import BATCH, IMAGE_SIZE, MODELS, NUM_LAYERS, make_model
from tests.export.counting import count, flop_of
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA, TowerCost
from trtower.errors import ConfigError
from trtower.spec import BatchProfile, TowerSpec
from trtower_export.families import Family, family_of
from trtower_export.graph import reference
from trtower_export.graph.cost import count_flop, measure_graph, measure_module
from trtower_export.graph.onnx_graph import write_onnx
from trtower_export.graph.operations import trace
from trtower_export.graph.truncate import TruncatedTower, truncate
from trtower_export.pipeline import ExportOptions, export_tower

LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
CLIP_L: dict[str, Any] = {**LARGE, "intermediate_size": 4096, "hidden_act": "quick_gelu"}
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
CLIP_L_336 = transformers.CLIPVisionConfig(**CLIP_L, image_size=336)
CLIP_L_224 = transformers.CLIPVisionConfig(**CLIP_L, image_size=224)
SIGLIP_384 = transformers.SiglipVisionConfig(**SO400M, image_size=384, patch_size=14)
DINOV2_L_518 = transformers.Dinov2Config(**LARGE, image_size=518)

TOWERS = [
    pytest.param(CLIP_L_336, -2, 577, 23, 366.0, id="clip-l-336"),
    pytest.param(CLIP_L_336, -1, 577, 24, 381.9, id="clip-l-336-whole"),
    pytest.param(CLIP_L_224, -2, 257, 23, 155.3, id="clip-l-224"),
    pytest.param(SIGLIP_384, -2, 729, 26, 641.8, id="siglip-so400m-384"),
    pytest.param(DINOV2_L_518, -1, 1370, 24, 1013.6, id="dinov2-l-518-whole"),
]
"""Config, layer, tokens, layers, and the GFLOP of one image: 2 x multiply-add of matrix products, convolutions and
attention."""

TOLERANCE = 1e-3
"""The table is rounded to a tenth of a GFLOP: 0.03 % of the smallest value."""

MORE = ("siglip", "siglip2", "aimv2", "aimv2-native")
"""Full towers that are more than layers: with a pooling head, or positions that are computed for each image."""


def on_meta(config: Any) -> tuple[Any, Family]:
    """Return a full-size model without weights, and its family."""
    family = family_of(config.model_type)
    with torch.device("meta"):
        model = getattr(transformers, family.model_class)._from_config(config, attn_implementation="sdpa")
    return model.eval(), family


def hollow(module: nn.Module, dtype: torch.dtype) -> Any:
    """Set weights that take no memory in a module on the meta device: one number, expanded to the weight's shape."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            halves = torch.full((), 0.5, dtype=dtype).expand(parameter.shape)
            setattr(part, name, nn.Parameter(halves, requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return module


def write(tower: nn.Module, spec: TowerSpec, precision: str, folder: Path, batch: BatchProfile = BATCH) -> TowerCost:
    """Write a cut tower, and count it as an export does. The operators in the file must have the same FLOP."""
    flop = count_flop(tower, spec.image_size)
    program = trace(tower, spec.input(precision), batch)
    write_onnx(program, spec.input(precision), spec.output(precision), folder)
    (folder / GRAPH_DATA).unlink()
    assert flop_of(folder / GRAPH) == flop
    assert precision == "fp32" or flop_of(folder / FUSED_GRAPH) == flop
    return measure_graph(folder / GRAPH, flop)


def cut(model: Any, layer: int | str = -2, image_size: int = IMAGE_SIZE) -> tuple[TruncatedTower, TowerSpec]:
    family = family_of(model.config.model_type)
    spec = family.spec(model.config, layer, "patch", image_size)
    return truncate(model, family, spec), spec


@pytest.mark.parametrize(("config", "layer", "tokens", "layers", "gflop"), TOWERS)
def test_cut_tower_costs_what_its_architecture_says(
    config: Any, layer: int, tokens: int, layers: int, gflop: float
) -> None:
    model, family = on_meta(config)
    spec = family.spec(config, layer, "patch")
    counted = count(truncate(model, family, spec), spec)
    assert (spec.num_tokens, counted.layers) == (tokens, layers)
    assert counted.flop / 1e9 == pytest.approx(gflop, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "extent"),
    [
        (CLIP_L_336, (24, 303_507_456, 381.9)),
        (SIGLIP_384, (27, 428_225_600, 670.3)),  # 666.5 for the layers; the rest is the pooling head
        (DINOV2_L_518, (24, 304_368_640, 1013.6)),
    ],
    ids=["clip", "siglip", "dinov2"],
)
def test_full_tower_is_counted_with_every_layer(config: Any, extent: tuple[int, int, float]) -> None:
    layers, parameters, gflop = extent
    full = measure_module(*on_meta(config), config.image_size)
    assert (full.layers, full.parameters) == (layers, parameters)
    assert full.flop / 1e9 == pytest.approx(gflop, rel=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_full_tower_of_every_family_is_counted(name: str) -> None:
    model = make_model(name)
    full = measure_module(model, family_of(model.config.model_type), IMAGE_SIZE)
    whole = count(*cut(model, "last_hidden_state"))
    assert full.layers == whole.layers == NUM_LAYERS
    assert full.flop > whole.flop if name in MORE else full.flop == whole.flop


def test_full_tower_is_counted_at_the_size_of_the_engine() -> None:
    other, same = (measure_module(*on_meta(config), 224) for config in (CLIP_L_336, CLIP_L_224))
    assert other.flop == same.flop
    assert other.parameters - same.parameters == (24**2 - 16**2) * 1024  # position embeddings, as loaded


def test_measuring_keeps_nothing_of_the_weights() -> None:
    model = make_model("clip")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    measure_module(model, family_of(model.config.model_type), IMAGE_SIZE)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert {weight() for weight in weights} == {None}


def test_equal_vectors_that_are_stored_once_count_each_time(tmp_path: Path) -> None:
    model = make_model("clip")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # as transformers initialises them
            parameter.data.fill_(float("norm" in name and name.endswith("weight")))
    tower, spec = cut(model)
    counted = count(tower, spec)
    assert write(tower, spec, "fp16", tmp_path) == counted
    graph = onnx.load(tmp_path / GRAPH, load_external_data=False).graph
    assert sum(prod(tensor.dims) for tensor in graph.initializer) < 0.998 * counted.parameters


def test_batch_changes_nothing(tmp_path: Path) -> None:
    tower, spec = cut(make_model("clip"))
    one = count(tower, spec)
    assert write(tower, spec, "fp16", tmp_path, BatchProfile(min=8, opt=8, max=8)) == one


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_one_layer_too_many_shows_in_every_figure(precision: str, tmp_path: Path) -> None:
    tower, spec = cut(make_model("clip"))
    whole = cut(make_model("clip"), -1)
    right, counted = count(tower, spec), count(*whole)
    wrong = write(*whole, precision, tmp_path)
    assert wrong == counted
    assert wrong.layers == right.layers + 1
    assert wrong.parameters == right.parameters + sum(p.numel() for p in tower.layers[0].parameters())
    assert wrong.flop > right.flop


def test_export_refuses_a_tower_that_was_cut_elsewhere(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "truncate", lambda model, *_: cut(model, -1)[0])
    with pytest.raises(ConfigError, match="cut has 4 of 4 layers; the spec reads 3 of 4"):
        export_tower(str(checkpoints["clip"]), tmp_path / "b", ExportOptions(flavour="none", check=False))


def test_manifest_agrees_with_the_file(clip_bundle: Path) -> None:
    bundle = Bundle.open(clip_bundle)
    model = make_model("clip")
    flop = flop_of(bundle.path / GRAPH)
    assert bundle.manifest.cut == measure_graph(bundle.path / GRAPH, flop) == count(*cut(model))
    assert bundle.manifest.full == measure_module(model, family_of(model.config.model_type), IMAGE_SIZE)


def test_unknown_operator_does_not_fail_an_export(tmp_path: Path) -> None:
    """The cost is only a line of text; its counter once failed on operators missing from a table."""
    body = 'y = Einsum <equation = "bchw,wo->bcho"> (x, v) z = com.example.Work (y, v)'
    opsets = '["": 23, "com.example": 1]'
    model = onnx.parser.parse_model(
        f"<ir_version: 11, opset_import: {opsets}> g (float[batch,6,8,8] x) => (float z) {{ {body} }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 2), np.float32), "v"))
    for number, node in enumerate(model.graph.node):
        node.name = f"layers.{number}.mlp/{node.op_type}"
    onnx.save(model, tmp_path / GRAPH)
    assert measure_graph(tmp_path / GRAPH, 7) == TowerCost(layers=2, parameters=16, flop=7)


@pytest.mark.parametrize(("config", "layer", "tokens", "layers", "gflop"), TOWERS)
def test_file_of_two_full_size_layers_costs_what_the_modules_do(
    config: Any, layer: int, tokens: int, layers: int, gflop: float, tmp_path: Path
) -> None:
    write_full_size(config, 2, "fp16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize(("config", "layer", "tokens", "layers", "gflop"), TOWERS)
def test_file_of_full_size_costs_what_its_architecture_says(
    config: Any, layer: int, tokens: int, layers: int, gflop: float, precision: str, tmp_path: Path
) -> None:
    extent = write_full_size(config, layer, precision, tmp_path)
    assert extent.layers == layers
    assert extent.flop / 1e9 == pytest.approx(gflop, rel=TOLERANCE)


def write_full_size(config: Any, layer: int, precision: str, folder: Path) -> TowerCost:
    """Write a full-size tower with weights that take no memory. The file must agree with the modules."""
    model, family = on_meta(config)
    spec = family.spec(config, layer, "patch")
    dtype = getattr(torch, spec.input(precision).dtype)
    counted = count(truncate(model, family, spec), spec)
    found = write(truncate(hollow(model, dtype), family, spec), spec, precision, folder)
    assert found == counted
    return found
