"""Fusing changes which functions are called, and not what is computed."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from trtower.graph.module import read_module

CLOSE = 1e-6
"""Relative difference of two orders of summing in FP32."""

HEADS, TOKENS, DIMENSION = 2, 5, 3
WIDTH = HEADS * DIMENSION
SPLIT, MERGED = [0, TOKENS, HEADS, DIMENSION], [0, TOKENS, WIDTH]

generator = np.random.default_rng(3)


def weights(**arrays: Any) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]


def draw(*shape: int) -> Any:
    return generator.standard_normal(shape).astype(np.float32)


def build(nodes: list[tuple[str, list[str], str, dict[str, Any]]], **arrays: Any) -> onnx.ModelProto:
    made = [
        helper.make_node(operator, inputs, [output], name=output, **attributes)
        for operator, inputs, output, attributes in nodes
    ]
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])
    features = helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, None)
    graph = helper.make_graph(made, "fused", [images], [features], weights(**arrays))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def compare(model: onnx.ModelProto) -> list[Any]:
    """Compare both forms, and return what the fused one calls."""
    plain, fused = read_module(model, b"", fused=False), read_module(model, b"")
    x = torch.from_numpy(draw(3, TOKENS, WIDTH))
    expected = plain(x)
    assert float((fused(x) - expected).norm() / expected.norm()) <= CLOSE
    read = {str(node.target) for node in fused.graph.nodes if node.op == "get_attr"}
    assert read == {name for name, _ in fused.named_buffers()}, "a weight is kept that nothing reads"
    return [node.target for node in fused.graph.nodes if node.op == "call_function"]


def attention(scale: float = 0.9, axis: int = -1, **more: Any) -> onnx.ModelProto:
    """Attention as `spell_out_attention` writes it, of one tensor that is query, key and value."""
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Reshape", ["x", "split"], "heads", {}),
        ("Transpose", ["heads"], "query", {"perm": [0, 2, 1, 3]}),
        ("Transpose", ["heads"], "keys", {"perm": [0, 2, 3, 1]}),
        ("Mul", ["query", "scale"], "scaled", {}),
        ("MatMul", ["scaled", "keys"], "scores", {}),
        ("Softmax", ["scores"], "shares", {"axis": axis}),
        ("MatMul", ["shares", "query"], "context", {}),
        ("Transpose", ["context"], "together", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["together", "merged"], "features", {}),
        *more.get("after", []),
    ]
    constants = {"split": np.array(SPLIT), "merged": np.array(MERGED), "scale": np.float32(scale)}
    return build(nodes, **constants, **more.get("arrays", {}))


def test_attention_keeps_its_own_scale() -> None:
    called = compare(attention(scale=0.3))
    assert called.count(functional.scaled_dot_product_attention) == 1
    assert torch.softmax not in called
    assert torch.matmul not in called


def test_softmax_over_another_axis_stays() -> None:
    assert functional.scaled_dot_product_attention not in compare(attention(axis=-2))


def test_attention_whose_shares_are_read_elsewhere_stays() -> None:
    after: Any = [
        ("ReduceMean", ["shares", "axes"], "mean", {}),
        ("Reshape", ["mean", "one"], "mean_flat", {}),
        ("Add", ["features", "mean_flat"], "both", {}),
    ]
    arrays = {"axes": np.array([1, 2, 3]), "one": np.array([-1, 1, 1])}
    assert functional.scaled_dot_product_attention not in compare(attention(after=after, arrays=arrays))


@pytest.mark.parametrize("turned", [False, True])
def test_bias_is_part_of_a_linear_layer_on_either_side_of_the_sum(*, turned: bool) -> None:
    summands = ["bias", "product"] if turned else ["product", "bias"]
    nodes: Any = [("MatMul", ["x", "weight"], "product", {}), ("Add", summands, "y", {})]
    assert compare(build(nodes, weight=draw(WIDTH, 4), bias=draw(4))) == [functional.linear]


def test_sum_with_something_else_than_a_bias_stays() -> None:
    nodes: Any = [("MatMul", ["x", "weight"], "product", {}), ("Add", ["product", "x"], "y", {})]
    assert compare(build(nodes, weight=draw(WIDTH, WIDTH))) == [functional.linear, torch.add]


def test_product_that_is_read_before_its_bias_is_added_stays_readable() -> None:
    nodes: Any = [
        ("MatMul", ["x", "weight"], "product", {}),
        ("Add", ["product", "bias"], "sum", {}),
        ("Mul", ["product", "sum"], "y", {}),
    ]
    assert compare(build(nodes, weight=draw(WIDTH, 4), bias=draw(4))) == [functional.linear, torch.add, torch.mul]


def test_linear_layers_of_one_input_are_one_product_if_all_have_a_bias_or_none() -> None:
    """Of four, two have a bias and two do not; their widths differ."""
    nodes: Any = [
        ("MatMul", ["x", "one"], "one_product", {}),
        ("MatMul", ["x", "two"], "two_product", {}),
        ("MatMul", ["x", "three"], "three_product", {}),
        ("MatMul", ["x", "four"], "four_product", {}),
        ("Add", ["one_product", "one_bias"], "first", {}),
        ("Add", ["three_product", "three_bias"], "third", {}),
        ("Concat", ["first", "two_product", "third", "four_product"], "y", {"axis": -1}),
    ]
    arrays = {name: draw(WIDTH, width) for name, width in (("one", 2), ("two", 3), ("three", 4), ("four", 5))}
    called = compare(build(nodes, **arrays, one_bias=draw(2), three_bias=draw(4)))
    assert called.count(functional.linear) == 2
    assert called.count(torch.split) == 2


def test_weight_that_is_read_twice_serves_both() -> None:
    nodes: Any = [
        ("MatMul", ["x", "weight"], "once", {}),
        ("MatMul", ["once", "weight"], "twice", {}),
        ("Mul", ["twice", "once"], "y", {}),
    ]
    assert compare(build(nodes, weight=draw(WIDTH, WIDTH))).count(functional.linear) == 2
