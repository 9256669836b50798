"""Every row of OPERATORS computes what onnx's reference evaluator computes, and forms without a row are refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from trtower.graph.module import read_module, why_unknown
from trtower.graph.operators import OPERATORS, UnknownOperatorError

OPSET = 23

CLOSE = 1e-6
"""Largest difference of two FP32 computations of numbers around 1, relative to the largest."""

generator = np.random.default_rng(3)


def draw(*shape: int) -> Any:
    return generator.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator of ``x``, which the graph reads, and constants; the batch is the first dimension of ``shape``."""

    operator: str
    shape: tuple[int, ...] = (2, 4, 6)
    constants: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    positive: bool = False


HALF_WAY = np.array([[-2.5, -1.5, -0.5, 0.5], [1.5, 2.5, 200.0, -200.0]], dtype=np.float32)
"""Numbers half-way between two integers go to the even one, and those outside the range to its end."""

CASES = [
    Case(operator="Add", constants=(draw(6),)),
    Case(operator="Sub", constants=(np.float32(0.5),)),
    Case(operator="Mul", constants=(draw(4, 6),)),
    Case(operator="Div", constants=(np.float32(255),)),
    Case(operator="Pow", constants=(np.float32(2),)),
    Case(operator="Neg"),
    Case(operator="Sqrt", positive=True),
    Case(operator="Reciprocal", positive=True),
    Case(operator="Sigmoid"),
    Case(operator="Gelu"),
    Case(operator="Gelu", attributes={"approximate": "tanh"}),
    Case(operator="Softmax"),
    Case(operator="Softmax", attributes={"axis": 1}),
    Case(operator="Clip", constants=(np.float32(-0.5), np.float32(0.25))),
    Case(operator="Clip", constants=(np.float32(0),)),
    Case(operator="Cast", attributes={"to": TensorProto.FLOAT16}),
    Case(operator="MatMul", constants=(draw(6, 5),)),
    Case(operator="Gemm", shape=(3, 6), constants=(draw(6, 5),)),
    Case(operator="Gemm", shape=(3, 6), constants=(draw(5, 6), draw(5)), attributes={"transB": 1}),
    Case(operator="Concat", constants=(draw(2, 3, 6),), attributes={"axis": 1}),
    Case(operator="Concat", constants=(draw(2, 4, 1),), attributes={"axis": -1}),
    Case(operator="Conv", shape=(2, 3, 8, 8), constants=(draw(5, 3, 4, 4), draw(5)), attributes={"strides": [4, 4]}),
    Case(operator="Conv", shape=(2, 3, 9, 11), constants=(draw(5, 3, 4, 2),), attributes={"strides": [4, 2]}),
    Case(operator="Conv", shape=(2, 3, 8), constants=(draw(5, 3, 1), draw(5)), attributes={"strides": [1]}),
    Case(operator="AveragePool", shape=(2, 3, 6, 6), attributes={"kernel_shape": [2, 3], "strides": [2, 3]}),
    Case(operator="LayerNormalization", constants=(draw(6), draw(6)), attributes={"epsilon": 1e-2}),
    Case(operator="LayerNormalization", constants=(draw(6),)),
    Case(operator="RMSNormalization", constants=(draw(6),), attributes={"epsilon": 1e-2}),
    Case(operator="ReduceMean", constants=(ints(-1),)),
    Case(operator="ReduceMean", constants=(ints(1, 2),), attributes={"keepdims": 0}),
    Case(operator="ReduceL2", constants=(ints(-1),)),
    Case(operator="Reshape", constants=(ints(2, 24),), attributes={"allowzero": 1}),
    Case(operator="Reshape", constants=(ints(0, -1, 3),)),
    Case(operator="Transpose", attributes={"perm": [0, 2, 1]}),
    Case(operator="Transpose", shape=(2, 3, 4, 5), attributes={"perm": [0, 2, 3, 1]}),
    Case(operator="Squeeze", shape=(2, 1, 6), constants=(ints(1),)),
    Case(operator="Expand", shape=(2, 1, 6), constants=(ints(1, 5, 1),)),
    Case(operator="Tile", constants=(ints(1, 2, 3),)),
    Case(operator="Gather", constants=(ints(3, 0, 1),), attributes={"axis": 1}),
    Case(operator="Gather", constants=(np.array([[1, 0], [2, 3]]),), attributes={"axis": 1}),
    Case(operator="Gather", constants=(np.array(2),), attributes={"axis": 1}),
    Case(operator="Slice", constants=(ints(1), ints(np.iinfo(np.int64).max), ints(1))),
    Case(operator="Slice", constants=(ints(0, -4), ints(3, -1), ints(1, 2), ints(2, 1))),
    Case(operator="Split", constants=(ints(1, 3),), attributes={"axis": 1}, outputs=2),
    Case(operator="Split", attributes={"axis": 2, "num_outputs": 3}, outputs=3),
    Case(operator="Attention", shape=(2, 3, 5, 4), constants=(draw(2, 3, 5, 4), draw(2, 3, 5, 4))),
    Case(
        operator="Attention",
        shape=(2, 5, 12),
        constants=(draw(2, 7, 12), draw(2, 7, 12)),
        attributes={"q_num_heads": 3, "kv_num_heads": 3, "scale": 0.3},
    ),
    Case(operator="QuantizeLinear", shape=(2, 4), constants=(np.float32(1), np.int8(0))),
    Case(operator="QuantizeLinear", shape=(2, 4), constants=(np.float32(0.5), np.int8(-3))),
    Case(operator="Shape", attributes={"start": 0, "end": 2}),
]


def model_of(case: Case, *, opset: int = OPSET, domain: str = "") -> onnx.ModelProto:
    names = [f"constant{index}" for index in range(len(case.constants))]
    outputs = [f"y{index}" for index in range(case.outputs)]
    node = helper.make_node(case.operator, ["x", *names], outputs, domain=domain, **case.attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *case.shape[1:]])],
        [helper.make_tensor_value_info(outputs[-1], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in zip(names, case.constants, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator)
def test_operator_computes_what_the_reference_computes(case: Case) -> None:
    x = HALF_WAY if case.operator == "QuantizeLinear" else draw(*case.shape)
    x = np.abs(x) + 1 if case.positive else x
    model = model_of(case)
    assert why_unknown(model) is None
    (expected,) = ReferenceEvaluator(model).run(None, {"x": x})
    found = read_module(model, b"")(torch.from_numpy(x))
    if isinstance(found, list):  # a shape, which is computed on the host
        assert found == expected.tolist()
        return
    assert found.shape == expected.shape
    assert found.dtype == getattr(torch, str(expected.dtype))
    assert np.abs(found.float().numpy() - expected.astype(np.float32)).max() <= CLOSE * np.abs(expected).max()


def test_every_operator_is_compared() -> None:
    later = {"DequantizeLinear"}  # below, with the weights it is for
    assert {case.operator for case in CASES} | later == OPERATORS.keys()


@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.FLOAT8E4M3FN])
def test_weights_in_8_bits_are_multiplied_by_the_scale_of_their_column(kind: int) -> None:
    numbers = np.array([[-4, 0, 7], [1, 2, -128]], dtype=np.int8)
    scales, x = np.array([0.5, 0.25, 2], dtype=np.float32), draw(3, 2)
    weights = numpy_helper.from_array(numbers, "w")
    if kind == TensorProto.FLOAT8E4M3FN:
        rounded = torch.from_numpy(numbers.astype(np.float32)).to(torch.float8_e4m3fn)
        weights = helper.make_tensor("w", kind, numbers.shape, rounded.view(torch.uint8).numpy().tobytes(), raw=True)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scales"], ["wide"], axis=1),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    model = graph_of(nodes, [weights, numpy_helper.from_array(scales, "scales")], (3, 2))
    expected = x @ (numbers * scales)
    assert np.allclose(read_module(model, b"")(torch.from_numpy(x)).numpy(), expected, rtol=1e-6)


def test_zero_point_of_8_bits_is_taken_away_again() -> None:
    scale, zero = (
        numpy_helper.from_array(np.asarray(value), name) for value, name in ((np.float32(0.5), "s"), (np.int8(5), "z"))
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["small"]),
        helper.make_node("DequantizeLinear", ["small", "s", "z"], ["y"]),
    ]
    found = read_module(graph_of(nodes, [scale, zero], (1, 4)), b"")(torch.tensor([[0.0, 1.2, -99.0, 99.0]]))
    assert found.tolist() == [[0.0, 1.0, -66.5, 61.0]]  # -128 to 127, minus 5, in halves


def test_8_bit_floats_end_at_their_largest_number() -> None:
    """A cast alone turns what is larger into NaN."""
    zero = helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, (), b"\0", raw=True)
    scale = numpy_helper.from_array(np.asarray(2, dtype=np.float32), "s")
    model = graph_of([helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], [scale, zero], (1, 4))
    found = read_module(model, b"")(torch.tensor([[1e4, -1e4, 3.0, 0.01]]))
    assert found.dtype == torch.float8_e4m3fn
    assert found.float().tolist() == [[448.0, -448.0, 1.5, 0.005859375]]


def graph_of(nodes: list[Any], constants: list[Any], shape: tuple[int, ...]) -> onnx.ModelProto:
    images = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape[1:]])
    features = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "several", [images], [features], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        (Case(operator="Resize"), {}, "the operator Resize"),
        (Case(operator="Add", constants=(draw(6),)), {"domain": "com.microsoft"}, "the operator Add"),
        (Case(operator="Add", constants=(draw(6),)), {"opset": 17}, "opset 17, where 18 to 23 are known"),
        (Case(operator="Add", constants=(draw(6),)), {"opset": 24}, "opset 24, where 18 to 23 are known"),
        (
            Case(operator="Conv", constants=(draw(5, 4, 1),), attributes={"strides": [1], "pads": [1, 1]}),
            {},
            r"the operator Conv with pads=\[1, 1\]",
        ),
        (Case(operator="Attention", constants=(draw(1), draw(1)), attributes={"is_causal": 1}), {}, "is_causal=1"),
        (
            Case(operator="Attention", constants=(draw(1), draw(1), draw(1))),
            {},
            "the operator Attention in another form",
        ),
        (Case(operator="Softmax", attributes={"axes": [1]}), {}, "the operator Softmax in another form"),
        (Case(operator="Add", constants=(np.float64(1),)), {}, "tensors of ONNX's type 11"),
    ],
)
def test_what_is_unknown_is_said_without_the_weights(case: Case, changes: dict[str, Any], reason: str) -> None:
    said = why_unknown(model_of(case, **changes))
    assert said is not None
    assert re.search(reason, said)


@pytest.mark.parametrize(
    "case",
    [
        Case(operator="Gather", constants=(ints(-1),), attributes={"axis": 1}),
        Case(operator="Slice", constants=(ints(3), ints(0), ints(1), ints(-1))),
        Case(operator="Conv", shape=(2, 3, 9, 9), constants=(draw(5, 3, 3, 3),), attributes={"strides": [2, 2]}),
        Case(operator="AveragePool", attributes={"kernel_shape": [2], "strides": [2]}),
        Case(operator="QuantizeLinear", constants=(draw(6), np.zeros(6, dtype=np.int8)), attributes={"axis": 2}),
        Case(
            operator="Attention",
            shape=(2, 5, 12),
            constants=(draw(2, 5, 4), draw(2, 5, 4)),
            attributes={"q_num_heads": 3, "kv_num_heads": 1},
        ),
    ],
    ids=lambda case: case.operator,
)
def test_form_that_only_the_weights_show_is_refused_when_it_is_read(case: Case) -> None:
    with pytest.raises(UnknownOperatorError, match=case.operator):
        read_module(model_of(case), b"")
