"""Emulate a half-precision graph in FP32 by rounding after every operation, to check it without a GPU.

ONNX Runtime has no BF16 kernels for the CPU, and its FP16 kernels keep more in FP32 than others do. Here each operation
is computed in FP32 and its result is rounded, as on a GPU that accumulates in FP32. FP32 parts of the graph stay as
they are. FP16 can overflow, and kernels differ in what else they round. So FP16 can be emulated at its worst, which
also rounds attention scores and the sums of a LayerNorm; `rounding.py` does the same to a traced tower. Only a check
uses the emulation, by `trtower check` or at the end of an export. It never serves a tower.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.extras import import_extra
from trtower.runners.base import OnStart, Runner
from trtower.spec import HALVES, PRECISIONS
from trtower_export.graph.onnx_graph import read_onnx

EMULATED = {f"emulated-{name}": name for name in HALVES}
"""The names for `trtower check --backend`, and the precision of each."""

SMALL = 1024
"""Weights up to this many bytes stay inside the graph. A graph in one protobuf message is limited to 2 GB."""


class EmulatedRunner(Runner):
    """A Runner on the CPU that computes in FP32 and rounds every result."""

    def __init__(self, bundle: Bundle, *, worst: bool) -> None:
        ort = import_extra("onnxruntime", extra="cpu", purpose="emulating half precision")
        precision = bundle.manifest.precision
        self._session: Any = open_session(read_emulated(bundle, worst=worst))
        self.backend = f"emulated-{precision}"
        self.files = (_graph(bundle, worst=worst), GRAPH_DATA)
        self.device = torch.device("cpu")
        self.dtype = DTYPES[bundle.manifest.output.dtype]
        self.pixel_dtype = PIXEL_DTYPES[bundle.manifest.input.dtype]
        self.name = f"onnxruntime {ort.__version__}, CPU, {precision.upper()} emulated"

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        if on_start:
            on_start(None)
        inputs = pixel_values if self.pixel_dtype == torch.uint8 else pixel_values.float()
        (features,) = self._session.run(None, {self._session.get_inputs()[0].name: inputs.numpy()})
        hidden_states.copy_(torch.from_numpy(features))

    def close(self) -> None:
        """See Runner.close."""
        self._session = None


def read_emulated(bundle: Bundle, *, worst: bool = True) -> onnx.ModelProto:
    """Read a bundle's graph with its weights, and turn it into an FP32 graph that rounds after every operation."""
    model = read_onnx(bundle, _graph(bundle, worst=worst))
    emulate(model, PRECISIONS[bundle.manifest.precision].onnx, worst=worst)
    return model


def _graph(bundle: Bundle, *, worst: bool) -> str:
    """Return the graph to emulate: at its worst FP16 rounds inside attention too, which GRAPH spells out."""
    rounds_inside = worst and bundle.manifest.output.dtype == "float16"
    return GRAPH if rounds_inside or FUSED_GRAPH not in bundle.manifest.files else FUSED_GRAPH


def open_session(model: onnx.ModelProto) -> Any:
    """Open a graph of any size with ONNX Runtime on the CPU."""
    ort = import_extra("onnxruntime", extra="cpu", purpose="running a graph")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # it copies the weights, and is no faster here
    names, values = [], []
    for tensor in model.graph.initializer:
        if tensor.ByteSize() > SMALL:  # kept outside the graph
            array = numpy_helper.to_array(tensor)
            names.append(tensor.name)
            values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="in memory")
    options.add_external_initializers(names, values)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def emulate(model: onnx.ModelProto, half: int, *, worst: bool) -> None:
    """Turn a graph of type ``half`` into an FP32 graph, in place, that rounds to ``half`` after every operation.

    Every value of the graph must have a type, as in every bundle. ``worst`` also rounds what FP16 kernels may round
    inside an operation.
    """
    graph = model.graph
    typed = (*graph.value_info, *graph.input, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed}
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type == half:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            graph.initializer[index].CopyFrom(numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:  # or bytes
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = TensorProto.FLOAT
        halves = [(index, name) for index, name in enumerate(node.output) if kinds[name] == half]
        for index, name in halves:
            node.output[index] = f"{name}.exact"
        spelled_out = SPELLED_OUT.get(node.op_type) if worst and halves and half == TensorProto.FLOAT16 else None
        graph.node.extend(spelled_out(node, half) if spelled_out else [node])
        for _, name in halves:
            graph.node.extend(_round(name, half))


def _round(name: str, half: int) -> Iterator[NodeProto]:
    """Round the value ``name``.exact into ``name``."""
    yield helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=half)
    yield helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)


def _layer_norm(node: NodeProto, half: int) -> Iterator[NodeProto]:
    (x, *affine), (y, *_), name = node.input, node.output, node.name
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    yield helper.make_node("Constant", [], [f"{name}.axes"], value_ints=[-1])
    yield helper.make_node("Constant", [], [f"{name}.epsilon"], value_float=epsilon)
    yield helper.make_node("Shape", [x], [f"{name}.size"], start=-1)
    yield helper.make_node("Cast", [f"{name}.size"], [f"{name}.count"], to=TensorProto.FLOAT)
    yield helper.make_node("ReduceSum", [x, f"{name}.axes"], [f"{name}.sum.exact"])
    yield from _round(f"{name}.sum", half)
    yield helper.make_node("Div", [f"{name}.sum", f"{name}.count"], [f"{name}.mean"])
    yield helper.make_node("Sub", [x, f"{name}.mean"], [f"{name}.centred"])
    yield helper.make_node("Mul", [f"{name}.centred"] * 2, [f"{name}.squares"])
    yield helper.make_node("ReduceSum", [f"{name}.squares", f"{name}.axes"], [f"{name}.total.exact"])
    yield from _round(f"{name}.total", half)
    yield helper.make_node("Div", [f"{name}.total", f"{name}.count"], [f"{name}.variance"])
    yield helper.make_node("Add", [f"{name}.variance", f"{name}.epsilon"], [f"{name}.positive"])
    yield helper.make_node("Sqrt", [f"{name}.positive"], [f"{name}.deviation"])
    result = f"{name}.normed"
    yield helper.make_node("Div", [f"{name}.centred", f"{name}.deviation"], [result])
    for kind, weight in zip(("Mul", "Add"), affine, strict=False):
        yield helper.make_node(kind, [result, weight], [f"{result}.{kind}"])
        result = f"{result}.{kind}"
    yield helper.make_node("Identity", [result], [y])


def _attention(node: NodeProto, half: int) -> Iterator[NodeProto]:
    query, key, value = node.input
    name, scale = node.name, next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    yield helper.make_node("Constant", [], [f"{name}.scale"], value_float=scale)
    yield helper.make_node("Mul", [query, f"{name}.scale"], [f"{name}.scaled.exact"])
    yield from _round(f"{name}.scaled", half)
    yield helper.make_node("Transpose", [key], [f"{name}.keys"], perm=[0, 1, 3, 2])
    yield helper.make_node("MatMul", [f"{name}.scaled", f"{name}.keys"], [f"{name}.scores.exact"])
    yield from _round(f"{name}.scores", half)
    yield helper.make_node("Softmax", [f"{name}.scores"], [f"{name}.shares.exact"], axis=-1)
    yield from _round(f"{name}.shares", half)
    yield helper.make_node("MatMul", [f"{name}.shares", value], [node.output[0]])


SPELLED_OUT = {"Attention": _attention, "LayerNormalization": _layer_norm}
"""Operators with intermediate values, which FP16 kernels may keep in FP16."""
