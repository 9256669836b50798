"""Turn a bundle's ONNX graph into a PyTorch module, with the types that the graph says.

The module is an fx graph of PyTorch's own functions: `print(module.code)` shows it. It holds the weights as buffers.
"""

import inspect
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from typing_extensions import Buffer

from trtower.dtypes import DTYPES
from trtower.graph.fusion import fuse
from trtower.graph.operators import OPERATORS, Operator, UnknownOperatorError, Value
from trtower.graph.packing import can_pack, pack_linears
from trtower.spec import PRECISIONS

UINT8, INT8, INT64 = 2, 3, 7
"""Numbers of types in ONNX's TensorProto, as in `Precision.onnx`."""

TYPES: Mapping[int, torch.dtype] = {
    UINT8: torch.uint8,
    INT8: torch.int8,
    INT64: torch.int64,
    PRECISIONS["fp8"].onnx_linear: torch.float8_e4m3fn,
    **{each.onnx: DTYPES[each.dtype] for each in PRECISIONS.values()},
}
"""ONNX's types that a graph may hold."""

FIELDS = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints"}
"""The field of ONNX's AttributeProto that holds the value, by the attribute's type."""

ONNX_NAME = "onnx"
"""Where a node of the module has the name of its value in the graph."""

OPSETS = range(18, 24)
"""The versions of ONNX's operators that OPERATORS was written for: since 18 reductions read their axes as an input."""


def why_unknown(model: Any) -> str | None:
    """Say what in a graph OPERATORS and TYPES do not have, without looking at its weights.

    Args:
        model: An onnx.ModelProto, with or without weights.

    Returns:
        The reason as a clause; None if all of it is known.
    """
    version = next((each.version for each in model.opset_import if not each.domain), 0)
    if version not in OPSETS:
        return f"opset {version}, where {OPSETS[0]} to {OPSETS[-1]} are known"
    for node in model.graph.node:
        try:
            _bind(node, read_attributes(node))
        except UnknownOperatorError as err:
            return str(err)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    held = {each.type.tensor_type.elem_type for each in values} | {each.data_type for each in model.graph.initializer}
    return f"tensors of ONNX's type {min(held - TYPES.keys())}" if held - TYPES.keys() else None


def read_module(
    model: Any,
    weights: Buffer,
    *,
    device: torch.device | str = "cpu",
    instead: Mapping[torch.dtype, torch.dtype] | None = None,
    fused: bool = True,
    packed: int = 0,
) -> fx.GraphModule:
    """Turn a graph into a module that computes the same: images (B, 3, S, S) -> hidden states (B, P + N, D).

    Args:
        model: An onnx.ModelProto without its weights.
        weights: The content of the file that holds them. The module does not read it any more.
        device: Where the module computes.
        instead: The types to compute in instead of some of the graph's. Weights keep the values that they were rounded
            to, and the input and output are of the new type, too.
        fused: Use PyTorch's fused functions for linear layers and attention. False makes one call for each node.
        packed: How many vectors a linear layer mostly gets, to lay out weights for it on the CPU; 0 leaves them alone.
            torch.compile cannot look into such a module.

    Returns:
        The module, with its own copy of the weights.

    Raises:
        UnknownOperatorError: The graph has an operator in a form that OPERATORS does not have.
    """
    reader = _Reader(memoryview(weights), torch.device(device), instead or {})
    graph = reader.read(model.graph)
    if fused:
        fuse(graph, reader.constants)
    if packed and can_pack():
        pack_linears(graph, reader.constants, packed)
    reader.copy_what_is_mapped()
    return fx.GraphModule(reader.constants, graph)


class _Reader:
    """Emits the nodes of a graph in their order.

    Attributes:
        constants: The weights and other constants that nodes read, by their names in the module.
    """

    def __init__(self, weights: memoryview, device: torch.device, instead: Mapping[torch.dtype, torch.dtype]) -> None:
        self.constants: dict[str, torch.Tensor] = {}
        self._weights, self._device = weights, device
        self._mapped = set[int]()  # the addresses of what is a view of the weights
        self._types = {number: instead.get(dtype, dtype) for number, dtype in TYPES.items()}
        self._graph = fx.Graph()
        self._values: dict[str, Value] = {"": None}  # an optional input that is absent has an empty name
        self._names: dict[torch.Tensor, str] = {}
        self._readers: dict[torch.Tensor, fx.Node] = {}
        self._node = ""

    def read(self, source: Any) -> fx.Graph:
        """Emit a GraphProto."""
        for tensor in source.initializer:
            self._values[tensor.name] = weight = self._load(tensor)
            self._names[weight] = tensor.name
        (images,), (features,) = source.input, source.output
        self._values[images.name] = self._graph.placeholder(images.name)
        for node in source.node:
            self._node = node.name
            try:
                results = self._emit(node)
            except UnknownOperatorError:
                raise
            except Exception as err:
                raise UnknownOperatorError(f"{node.op_type} as {node.name} has it ({err})") from err
            for name, value in zip(node.output, results, strict=True):
                self._values[name] = value
                if isinstance(value, fx.Node):
                    value.meta[ONNX_NAME] = name
        self._graph.output(self._values[features.name])
        for each in (self._values, self._names, self._readers):
            each.clear()  # so that fusing can free the weights that it lays out anew
        return self._graph

    def _emit(self, node: Any) -> Sequence[Value]:
        attributes = read_attributes(node)
        row = _bind(node, attributes)
        given = {name: value for name, value in attributes.items() if name not in row.fixed}
        if "to" in given:
            given["to"] = self._types[given["to"]]
        result = row.emit(self._call, *(self._values[name] for name in node.input), **given)
        if len(node.output) == 1:
            return [result]
        return [self._call(operator.getitem, result, index) for index in range(len(node.output))]

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Value:
        """Add a call to the graph; make it at once if everything that it reads is constant."""
        nodes: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), nodes.append)
        if not nodes:
            with torch.no_grad():
                return function(*args, **kwargs)
        args = fx.node.map_aggregate(args, lambda each: self._read(each) if isinstance(each, torch.Tensor) else each)
        return self._graph.create_node("call_function", function, args, kwargs, name=self._node or None)

    def _read(self, constant: torch.Tensor) -> Any:
        """Return what reads a constant in the graph: the number itself, or a buffer."""
        if constant.ndim == 0 and constant.is_floating_point():
            return constant.item()
        if constant not in self._readers:
            name = re.sub(r"\W", "_", self._names.get(constant, f"{self._node}/constant")).lstrip("_")
            while name in self.constants:
                name += "_"
            self.constants[name] = constant.to(self._device)
            self._readers[constant] = self._graph.get_attr(name)
        return self._readers[constant]

    def copy_what_is_mapped(self) -> None:
        """Give the module its own copies of the constants that are views of the file."""
        for name, constant in self.constants.items():
            if constant.layout is torch.strided and constant.untyped_storage().data_ptr() in self._mapped:
                self.constants[name] = constant.clone()  # aligned as PyTorch's kernels like it, in the same strides

    def _load(self, tensor: Any) -> torch.Tensor:
        """View a weight in the file if that is possible, or copy it from there or from the graph."""
        place = {entry.key: entry.value for entry in tensor.external_data}
        content: bytes | memoryview = tensor.raw_data
        if place:
            start = int(place.get("offset", 0))
            content = self._weights[start : start + int(place["length"])]
        if isinstance(content, memoryview) and not content.readonly:
            held = torch.frombuffer(content, dtype=torch.uint8)
            self._mapped.add(held.untyped_storage().data_ptr())
        else:
            held = torch.empty(len(content), dtype=torch.uint8, device="cpu")
            held.numpy()[:] = np.frombuffer(content, dtype=np.uint8)
        values = held.view(TYPES[tensor.data_type]).reshape(tuple(tensor.dims))
        if tensor.data_type == INT64:  # shapes and indices, which are read on the host
            return values
        return values.to(self._device).to(self._types[tensor.data_type])


def _bind(node: Any, attributes: Mapping[str, Any]) -> Operator:
    """Return the row of a node's operator; raise UnknownOperatorError if there is none for this form of it."""
    row = OPERATORS.get(node.op_type)
    if row is None or node.domain not in ("", "ai.onnx"):
        raise UnknownOperatorError(f"the operator {node.op_type}")
    for name, value in attributes.items():
        allowed = row.fixed.get(name)
        elements = value if isinstance(value, list) else [value]
        if allowed is not None and not set(elements) <= set(allowed):
            raise UnknownOperatorError(f"the operator {node.op_type} with {name}={value}")
    given = {name: value for name, value in attributes.items() if name not in row.fixed}
    try:
        inspect.signature(row.emit).bind(None, *node.input, **given)
    except TypeError as err:
        raise UnknownOperatorError(f"the operator {node.op_type} in another form ({err})") from err
    return row


def read_attributes(node: Any) -> dict[str, Any]:
    """Read the attributes of a NodeProto as numbers, strings and lists."""
    attributes: dict[str, Any] = {}
    for each in node.attribute:
        if each.type not in FIELDS:
            raise UnknownOperatorError(f"the operator {node.op_type} with an attribute {each.name} of another kind")
        value = getattr(each, FIELDS[each.type])
        if isinstance(value, bytes):
            value = value.decode()
        attributes[each.name] = value if isinstance(value, int | float | str) else list(value)
    return attributes
