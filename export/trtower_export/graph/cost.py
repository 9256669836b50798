"""Count what a tower is and what it costs: layers, parameters, and the FLOP of one image.

The full tower is counted in PyTorch and the cut one in the ONNX file that was written, so that what is said of a cut
is read from its result and not from its intention. A multiply-add is two FLOP. Counted are matrix products,
convolutions and attention; norms, activations, softmax and sums are not.
"""

import copy
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trtower.bundle.manifest import TowerCost
from trtower.errors import BuildError
from trtower.spec import PRECISIONS
from trtower_export.families import Family


def measure_module(model: nn.Module, family: Family, image_size: int) -> TowerCost:
    """Count a full tower as transformers runs it on S pixels a side: every layer, and the pooling head of a SigLIP.

    Its parameters are those that it has: position embeddings in the checkpoint's own number, whatever S is.
    """
    states, flop = run_weightless(model, family.read_states, image_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TowerCost(layers=len(states) - 2, parameters=parameters, flop=flop)  # states 0 to L, and last_hidden_state


def run_weightless(model: nn.Module, run: Callable[[Any, Tensor], Any], image_size: int) -> tuple[Any, int]:
    """Run a copy of ``model`` that has shapes but no weights on one image; give what came out, and its FLOP.

    Fake tensors and not the meta device, which transformers' masks and rotations do not get through.
    """
    tensors = (*model.parameters(), *model.buffers())
    with FakeTensorMode(allow_non_fake_inputs=True):
        weightless = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors}
        pixel_values = torch.empty(1, 3, image_size, image_size)
    twin = copy.deepcopy(model, weightless)
    # Fused attention is not counted on a CPU; spelled out, it is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = run(twin, pixel_values)
    return output, counter.get_total_flops()


def measure_graph(path: Path) -> TowerCost:
    """Count a tower in its ONNX file, without its weights. Raises BuildError on an operator of unknown cost.

    A layer is an attention: one Attention node, or the Softmax of one that is spelled out (opset 20). A parameter is
    an element of a float initialiser, tables that were computed from the grid among them; a single number is a
    constant. Vectors count each time they are read, because the exporter stores equal ones once, such as the norms
    and biases of drawn weights.
    """
    model = onnx.load_model(path, load_external_data=False)
    shapes, graph = _infer_shapes(model), model.graph
    reads = Counter(name for node in graph.node for name in node.input)
    scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    return TowerCost(
        layers=sum(node.op_type in ("Attention", "Softmax") for node in graph.node),
        parameters=sum(
            prod(tensor.dims) * (reads[tensor.name] if len(tensor.dims) == 1 else 1)
            for tensor in graph.initializer
            if tensor.data_type in WEIGHTS and prod(tensor.dims) > 1 and tensor.name not in scales
        ),
        flop=sum(_count(node, shapes) for node in graph.node),
    )


class _Shapes(dict[str, tuple[int, ...]]):
    def __missing__(self, name: str) -> tuple[int, ...]:
        raise BuildError(f"the shape of {name} is unknown in the graph, so what reads it cannot be counted.")


def _infer_shapes(model: onnx.ModelProto) -> _Shapes:
    """Find the shape of every value for a batch of one."""
    graph = model.graph
    del graph.value_info[:]
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_value = 1
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")  # inferred with the others
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = _Shapes({tensor.name: tuple(tensor.dims) for tensor in graph.initializer})
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _count(node: onnx.NodeProto, shapes: _Shapes) -> int:
    if node.domain not in ("", "ai.onnx") or (node.op_type not in WORK and node.op_type not in UNCOUNTED):
        raise BuildError(
            f"the graph has {node.op_type} ({node.name}), and it is not known what that costs: say so in "
            "trtower_export/graph/cost.py, where the others are."
        )
    return WORK[node.op_type](node, shapes) if node.op_type in WORK else 0


def _matmul(node: onnx.NodeProto, shapes: _Shapes) -> int:
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: _Shapes) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _conv(node: onnx.NodeProto, shapes: _Shapes) -> int:
    return 2 * prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])  # weights (O, I / groups, *kernel)


def _attention(node: onnx.NodeProto, shapes: _Shapes) -> int:
    # (B, H, T, D / H) or (B, T, D): every element of a query meets all keys, and of the output, all values.
    query, key, output = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    return 2 * key[-2] * (prod(query) + prod(output))


WEIGHTS = {number for each in PRECISIONS.values() for number in (each.onnx, each.onnx_linear)}
"""The types of weights."""

WORK: dict[str, Callable[[onnx.NodeProto, _Shapes], int]] = {
    "Attention": _attention,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
"""The operators that carry the work, and their FLOP."""

_MOVING = (
    "Cast CastLike Concat Constant ConstantOfShape DequantizeLinear Expand Flatten Gather GatherElements GatherND "
    "Identity Pad QuantizeLinear Range Reshape ScatterElements ScatterND Shape Size Slice Split Squeeze Tile Transpose "
    "Trilu Unsqueeze Where"
)
_ELEMENTWISE = (
    "Abs Add And Ceil Clip Cos Div Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish LeakyRelu "
    "Less LessOrEqual Log Max Min Mod Mul Neg Not Or Pow Reciprocal Relu RotaryEmbedding Round Sigmoid Sign Sin "
    "Softplus Sqrt Sub Sum Swish Tanh"
)
_REDUCING = (
    "AveragePool GlobalAveragePool GroupNormalization InstanceNormalization LayerNormalization MaxPool "
    "RMSNormalization ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare Resize Softmax"
)
UNCOUNTED = frozenset(f"{_MOVING} {_ELEMENTWISE} {_REDUCING}".split())
"""The operators that cost little: in proportion to their tensors."""
