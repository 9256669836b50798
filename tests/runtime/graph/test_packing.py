"""Weights laid out for oneDNN change how fast linear layers are, and not what they compute."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import fx
from torch.nn import functional

from tests.runtime.graph.test_fusion import TOKENS, WIDTH, attention, build, draw
from trtower import Bundle, VisionTower
from trtower.bundle.manifest import GRAPH_DATA
from trtower.graph import module as reading
from trtower.graph import packing
from trtower.graph.module import read_module
from trtower.runners.choose import choose
from trtower.runners.processor import multiplies_bf16

CLOSE = 1e-6
"""Relative difference of two orders of summing in FP32."""

ROUNDED = 4e-3
"""The same after rounding to BF16, which has steps of 2 ** -8."""

can_pack = pytest.mark.skipif(not packing.can_pack(), reason="this PyTorch cannot pack weights on this processor")


def linear(*, bias: bool) -> onnx.ModelProto:
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [("MatMul", ["x", "weight"], "product", {})]
    nodes += [("Add", ["product", "bias"], "sum", {})] if bias else []
    arrays = {"weight": draw(WIDTH, 20)} | ({"bias": draw(20)} if bias else {})
    return build(nodes, **arrays)


@can_pack
@pytest.mark.parametrize("model", [linear(bias=True), linear(bias=False), attention()], ids=["bias", "none", "others"])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_it_computes_the_same_for_any_number_of_vectors(model: onnx.ModelProto, batch: int) -> None:
    plain, packed = read_module(model, b""), read_module(model, b"", packed=TOKENS)
    x = torch.from_numpy(draw(batch, TOKENS, WIDTH))
    expected = plain(x)
    assert float((packed(x) - expected).norm() / expected.norm()) <= CLOSE
    strided = torch.from_numpy(draw(TOKENS, batch, WIDTH)).transpose(0, 1)
    assert torch.allclose(packed(strided), plain(strided), rtol=CLOSE, atol=CLOSE)
    assert functional.linear not in {node.target for node in packed.graph.nodes}


@can_pack
@pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no BF16 arithmetic")
def test_in_bf16_it_differs_by_a_rounding_at_most() -> None:
    """On an AMD EPYC every bit is the same; a processor may have other kernels for packed weights."""
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    instead = {torch.float32: torch.bfloat16}
    model = linear(bias=True)
    plain, packed = (read_module(model, b"", instead=instead, packed=rows) for rows in (0, TOKENS))
    found, expected = packed(x).float(), plain(x).float()
    assert float((found - expected).norm() / expected.norm()) <= ROUNDED


@can_pack
def test_packed_weights_are_copies(fp32_bundle: Path) -> None:
    weights = Bundle.open(fp32_bundle).map(GRAPH_DATA)
    read = read_module(onnx.load(fp32_bundle / "tower.onnx", load_external_data=False), weights, packed=9)
    x = torch.randn(1, 3, 42, 42)
    expected = read(x)
    weights[:] = bytes(len(weights))  # a private map: the file stays as it is
    assert torch.equal(read(x), expected)


@can_pack
def test_callers_compiler_does_not_look_inside(clip_bundle: Path) -> None:
    """PyTorch's own compiler cannot lower packed weights."""
    tower, seen = VisionTower.load(clip_bundle, "torch-cpu"), list[Any]()

    def collect(module: fx.GraphModule, _: Any) -> Any:
        seen.extend(node.target for node in module.graph.nodes)
        return module.forward

    x = torch.randn(1, 3, 42, 42)
    with warnings.catch_warnings():  # torch warns of what it cannot trace, such as our check for a fork
        warnings.simplefilter("ignore")
        found: Any = torch.compile(lambda images: tower(images * 1) * 1, backend=collect)(x)
    assert torch.equal(found, tower(x))
    assert seen, "nothing was compiled"
    assert torch.ops.mkldnn._linear_pointwise not in seen
    assert torch.ops.mkldnn._linear_pointwise.default not in seen


@can_pack
def test_towers_on_the_cpu_are_packed(clip_bundle: Path) -> None:
    loaded: Any = choose(Bundle.open(clip_bundle), "torch-cpu")
    called = {node.target for node in inspect.unwrap(loaded._compute).__self__._module.graph.nodes}
    assert functional.linear not in called
    assert torch.ops.mkldnn._linear_pointwise in called


def test_without_the_operators_weights_stay_as_they_are_and_are_copies(
    fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "can_pack", lambda: False)
    bundle = Bundle.open(fp32_bundle)
    weights = bundle.map(GRAPH_DATA)
    model = onnx.load(fp32_bundle / "tower.onnx", load_external_data=False)
    read = read_module(model, weights, packed=9)
    assert functional.linear in {node.target for node in read.graph.nodes}
    x = torch.randn(1, 3, 42, 42)
    expected = read(x)
    weights[:] = bytes(len(weights))  # a private map: the file stays as it is
    assert torch.equal(read(x), expected)
    assert not bundle.altered()


def test_another_processor_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not packing.can_pack()
