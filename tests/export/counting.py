"""Count the cost of a cut tower: in PyTorch by its modules, and in an ONNX file by its operators."""

from collections.abc import Callable
from math import prod
from pathlib import Path

import onnx
from torch import nn

from trtower.bundle.manifest import TowerCost
from trtower.spec import TowerSpec
from trtower_export.graph.cost import count_flop

Shapes = dict[str, tuple[int, ...]]


def count(tower: nn.Module, spec: TowerSpec) -> TowerCost:
    """Count a cut tower in PyTorch; its parameters include tables that were computed for its size."""
    floats = [tensor for tensor in (*tower.parameters(), *tower.buffers()) if tensor.is_floating_point()]
    parameters = sum(tensor.numel() for tensor in floats)
    return TowerCost(layers=spec.depth, parameters=parameters, flop=count_flop(tower, spec.image_size))


def flop_of(path: Path) -> int:
    """Count matrix products, convolutions and attention for a batch of one. A multiply-add counts as two."""
    model = onnx.load_model(path, load_external_data=False)
    shapes = _infer_shapes(model)
    return sum(WORK[node.op_type](node, shapes) for node in model.graph.node if node.op_type in WORK)


def _infer_shapes(model: onnx.ModelProto) -> Shapes:
    graph = model.graph
    del graph.value_info[:]
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_value = 1
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")  # inferred with the others
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _matmul(node: onnx.NodeProto, shapes: Shapes) -> int:
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _conv(node: onnx.NodeProto, shapes: Shapes) -> int:
    return 2 * prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])  # weights (O, I / groups, *kernel)


def _attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    # (B, H, T, D / H) or (B, T, D): every element of the query meets all keys, every element of the output all values.
    query, key, output = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    return 2 * key[-2] * (prod(query) + prod(output))


WORK: dict[str, Callable[[onnx.NodeProto, Shapes], int]] = {
    "Attention": _attention,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
"""The operators that do the work in these towers."""
