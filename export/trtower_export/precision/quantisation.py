"""Calibrate the linear layers of a tower for INT8 or FP8, and quantise them in its ONNX graph.

The range of a layer's input, and of its weights, is their largest magnitude. Linear layers that are left out stay in
half precision, and so do norms, softmax, attention's own products, the patch embedding and residuals. Scales are in
FP32: with FP16 scales, TensorRT-RTX 1.7 keeps the raw sums of INT8 products in FP16, and in a third of the layers of a
pretrained ViT-S/14 these sums would overflow (computed, not run).
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir import DataType
from torch import Tensor, nn
from torch.export import ExportedProgram

from trtower.bundle.bundle import Bundle
from trtower.errors import CheckpointError, ConfigError
from trtower.spec import PRECISIONS
from trtower_export.graph.onnx_graph import read_onnx
from trtower_export.graph.operations import Operations
from trtower_export.graph.truncate import TruncatedTower


@dataclass(frozen=True, kw_only=True)
class Format:
    """The number format of an 8-bit precision.

    Attributes:
        precision: The precision, "int8" or "fp8".
        dtype: The format's type in torch.
        largest: Its largest number.
        per_channel: Whether each output of a layer has its own weight scale; if not, the layer has one.
        spares_activated: Whether layers that an activation feeds stay in half precision by default.
    """

    precision: str
    dtype: torch.dtype
    largest: float
    per_channel: bool = False
    spares_activated: bool = False

    @property
    def onnx(self) -> DataType:
        """The format's type in ONNX."""
        return DataType(PRECISIONS[self.precision].onnx_linear)


FORMATS = {
    each.precision: each
    for each in (
        Format(precision="int8", dtype=torch.int8, largest=127.0, per_channel=True, spares_activated=True),
        Format(precision="fp8", dtype=torch.float8_e4m3fn, largest=448.0),
    )
}

INPUT_SCALE, WEIGHT_SCALE, WEIGHT = ".input_scale", ".weight_scale", ".weight_8bit"
"""Suffixes of the names of a quantised layer's tensors, after its module's path."""

ZERO_POINT = "zero_point"
"""The name of the one zero point that all layers share."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The sizes of a layer's 8-bit steps: one for its input, and for its weight one () or one per output (O,)."""

    input: float
    weight: Tensor


Quantisation = Mapping[str, Scales]
"""The scales of every quantised layer, keyed by its module's path in the tower."""


def left_in_half(program: ExportedProgram, precision: str, patterns: Sequence[str] | None) -> set[str]:
    """Return the names of a traced tower's operations that an 8-bit precision leaves in half precision.

    ``patterns`` name them; None means the format's default. INT8 rounds a layer's whole input in steps of one size.
    After an activation a few values are far larger than others and make the steps too coarse for these, so by default
    the layers that read an activation stay in half precision. On a pretrained ViT-S/14 this lowers the relative error
    of INT8 from 0.16 to 0.08 (`make precisions`).
    """
    operations = Operations(program)
    if patterns is not None:
        return set(operations.match(patterns))
    if not FORMATS[precision].spares_activated:
        return set()
    return {operation.name for operation in operations if operations.follows_activation(operation)}


@torch.no_grad()
def calibrate(tower: nn.Module, precision: str, images: Sequence[Tensor], leave: Collection[str]) -> Quantisation:
    """Measure the scales of the linear layers of ``tower`` on ``images``, each (1, 3, S, S).

    Layers in ``leave`` are left out. Raises ConfigError if these are all layers, and CheckpointError if the input of a
    layer is not finite.
    """
    layers: dict[str, Any] = {name: tower.get_submodule(name) for name in linear_layers(tower) if name not in leave}
    if not layers:
        raise ConfigError(
            f"--precision {precision} has no linear layer to quantise: all are kept in higher precision. Name fewer "
            "with --keep-fp16 or --keep-fp32."
        )
    largest = dict.fromkeys(layers, torch.tensor(0.0))

    with ExitStack() as hooks:
        for name, layer in layers.items():

            def record(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                largest[name] = torch.maximum(largest[name], inputs[0].abs().max().float())

            hooks.enter_context(layer.register_forward_pre_hook(record))
        for pixel_values in images:
            tower(pixel_values)
    for name, magnitude in largest.items():
        if not magnitude.isfinite():
            raise CheckpointError(
                f"the input of {name} is not finite in FP32. To see where that begins, run: trtower doctor CHECKPOINT"
            )
    form = FORMATS[precision]
    weights = {name: layer.weight.abs().float() for name, layer in layers.items()}
    return {
        name: Scales(
            input=float(_scale(largest[name], form)),
            weight=_scale(weight.amax(dim=1) if form.per_channel else weight.max(), form),
        )
        for name, weight in weights.items()
    }


def _scale(magnitude: Tensor, form: Format) -> Tensor:
    """Return the step with which numbers up to ``magnitude`` fit 8 bits; if all are zero, any step will do."""
    return torch.where(magnitude > 0, magnitude / form.largest, 1.0)


def linear_layers(tower: nn.Module) -> list[str]:
    """List the linear layers inside the transformer layers. The patch embedding and the head are outside."""
    return [n for n, m in tower.named_modules() if isinstance(m, nn.Linear) and n.startswith("layers.")]


def simulate_quantised(tower: TruncatedTower, precision: str, quantisation: Quantisation) -> TruncatedTower:
    """Return a copy of an FP32 ``tower`` that simulates 8 bits by rounding inputs and weights of quantised layers."""
    quantised, form = copy.deepcopy(tower), FORMATS[precision]
    for name, scales in quantisation.items():
        layer: Any = quantised.get_submodule(name)
        weight = scales.weight.reshape(-1, *([1] if scales.weight.ndim else []))
        layer.weight = nn.Parameter(_rounded(layer.weight.float(), weight, form), requires_grad=False)

        def round_input(_: nn.Module, args: tuple[Tensor], scale: float = scales.input) -> tuple[Tensor]:
            return (_rounded(args[0], torch.tensor(scale), form),)

        layer.register_forward_pre_hook(round_input)
    return quantised


def _rounded(numbers: Tensor, scale: Tensor, form: Format) -> Tensor:
    steps = (numbers / scale.to(numbers.device)).clamp(-form.largest, form.largest)
    eight = steps.to(form.dtype).float() if form.dtype.is_floating_point else steps.round()
    return eight * scale.to(numbers.device)


def write_quantised(
    model: onnx_ir.Model, modules: Mapping[onnx_ir.Node, str], *, precision: str, scales: Quantisation
) -> None:
    """Put QuantizeLinear and DequantizeLinear around the inputs and weights of quantised layers, in place.

    ``modules`` maps nodes to the modules that they come from. Layers that read the same tensor with the same scale
    share its quantised form, as queries, keys and values do.
    """
    form, graph = FORMATS[precision], model.graph
    zero: onnx_ir.Value | None = None  # says the type of 8 bits; opset 20 has no attribute for it
    quantised: dict[tuple[onnx_ir.Value, float], onnx_ir.Value] = {}
    for node in list(graph):
        module = modules.get(node, "")
        if node.op_type != "MatMul" or module not in scales:
            continue
        x, weight = node.inputs
        assert x and weight and weight.const_value and weight.dtype  # noqa: S101, PT018 - a linear layer has them
        half = weight.dtype
        scale = scales[module].input
        if (x, scale) not in quantised:
            input_scale = _constant(graph, module + INPUT_SCALE, np.array(scale, np.float32))
            wide = _insert(node, "Cast", [x], {"to": DataType.FLOAT}, DataType.FLOAT)
            zero = zero or _constant(graph, ZERO_POINT, np.zeros((), form.onnx.numpy()), form.onnx)
            eight = _insert(node, "QuantizeLinear", [wide, input_scale, zero], {}, form.onnx)
            back = _insert(node, "DequantizeLinear", [eight, input_scale], {}, DataType.FLOAT)
            quantised[x, scale] = _insert(node, "Cast", [back], {"to": half}, half)
        node.replace_input_with(0, quantised[x, scale])
        steps = scales[module].weight.numpy()
        values = weight.const_value.numpy().astype(np.float32) / steps  # (I, O) by () or (O,)
        values = (values if form.dtype.is_floating_point else np.rint(values)).clip(-form.largest, form.largest)
        stored = _constant(graph, module + WEIGHT, np.ascontiguousarray(values.astype(form.onnx.numpy())), form.onnx)
        weight_scale = _constant(graph, module + WEIGHT_SCALE, np.ascontiguousarray(steps))
        axis = {"axis": 1} if form.per_channel else {}
        back = _insert(node, "DequantizeLinear", [stored, weight_scale], axis, DataType.FLOAT)
        node.replace_input_with(1, _insert(node, "Cast", [back], {"to": half}, half))
        if not weight.uses():
            del graph.initializers[str(weight.name)]


def read_quantised(bundle: Bundle) -> Quantisation:
    """Read the scales from a bundle's graph."""
    graph = read_onnx(bundle).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    scales = {}
    for node in graph.node:
        module, _, kind = node.name.rpartition("/")
        if kind == "MatMul" and module + WEIGHT_SCALE in tensors:
            (dequantised,) = (makers[name] for name in makers[node.input[0]].input)
            scales[module] = Scales(
                input=float(numpy_helper.to_array(tensors[dequantised.input[1]])),
                weight=torch.from_numpy(numpy_helper.to_array(tensors[module + WEIGHT_SCALE]).copy()),
            )
    return scales


def _constant(graph: onnx_ir.Graph, name: str, array: Any, dtype: DataType = DataType.FLOAT) -> onnx_ir.Value:
    tensor = onnx_ir.Tensor(array, dtype=dtype, name=name)
    value = onnx_ir.Value(
        name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(dtype)
    )
    graph.register_initializer(value)
    return value


def _insert(
    before: onnx_ir.Node,
    kind: str,
    inputs: list[onnx_ir.Value],
    attributes: dict[str, Any],
    dtype: DataType,
) -> onnx_ir.Value:
    """Insert a node before another; its name comes from its first input, and so does the shape of its result."""
    graph = before.graph
    assert graph is not None  # noqa: S101 - the node comes from a graph
    node = onnx_ir.node(kind, inputs, attributes=attributes, name=f"{inputs[0].name}/{kind}")
    graph.insert_before(before, node)
    (result,) = node.outputs
    result.dtype, result.shape = dtype, inputs[0].shape
    return result
