"""Calibrate the linear layers of a tower for INT8 or FP8, and quantise them in its ONNX graph.

The range of a layer's input, and of its weights, is their largest magnitude. Linear layers that are left out stay in
half precision, and so do norms, softmax, attention's own products, the patch embedding and residuals. Scales are in
FP32: with FP16 scales, TensorRT-RTX 1.7 keeps the raw sums of INT8 products in FP16, and in a third of the layers of a
pretrained ViT-S/14 these sums would overflow (computed, not run).

INT8 has steps of one size, and in the inputs of some layers, most of all after an activation function, a few channels
are far larger than the others. So these channels are first made smaller, and their weights larger by as much, as in
SmoothQuant (Xiao et al., 2023, https://arxiv.org/abs/2211.10438). FP8 has small steps for small numbers, and needs no
smoothing.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir import DataType
from torch import Tensor, nn

from trtower.bundle.bundle import Bundle
from trtower.errors import CheckpointError, ConfigError
from trtower.spec import PRECISIONS
from trtower_export.graph.onnx_graph import add_constant, read_onnx
from trtower_export.graph.truncate import TruncatedTower


@dataclass(frozen=True, kw_only=True)
class Format:
    """The number format of an 8-bit precision.

    Attributes:
        precision: The precision, "int8" or "fp8".
        dtype: The format's type in torch.
        largest: Its largest number.
        per_channel: Whether each output of a layer has its own weight scale; if not, the layer has one.
        smoothing: How much of the differences between an input's channels moves into the weights, from 0 to 1. None
            leaves the channels as they are.
    """

    precision: str
    dtype: torch.dtype
    largest: float
    per_channel: bool = False
    smoothing: float | None = None

    @property
    def onnx(self) -> DataType:
        """The format's type in ONNX."""
        return DataType(PRECISIONS[self.precision].onnx_linear)


FORMATS = {
    each.precision: each
    for each in (
        Format(precision="int8", dtype=torch.int8, largest=127.0, per_channel=True, smoothing=0.5),
        Format(precision="fp8", dtype=torch.float8_e4m3fn, largest=448.0),
    )
}

SMOOTHING, INPUT_SCALE = ".input_smoothing", ".input_scale"
WEIGHT_SCALE, WEIGHT = ".weight_scale", ".weight_8bit"
"""Suffixes of the names of a quantised layer's tensors, after its module's path."""

LEAST_CHANNEL = 1e-3
"""A channel smaller than this share of the largest is smoothed as if it were so large: it may have been idle only on
the images of the calibration."""

ZERO_POINT = "zero_point"
"""The name of the one zero point that all layers share."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """How the numbers of a layer become 8 bits.

    Attributes:
        input: The size of the input's steps, after smoothing.
        weight: The size of the weight's steps, after smoothing: one () or one per output (O,).
        smoothing: By what each channel of the input is multiplied, and its weights divided (I,). None is not at all.
    """

    input: float
    weight: Tensor
    smoothing: Tensor | None = None


Quantisation = Mapping[str, Scales]
"""The scales of every quantised layer, keyed by its module's path in the tower."""


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
    channels: dict[str, Tensor] = {}  # the largest magnitude of each (I,)

    with ExitStack() as hooks:
        for name, layer in layers.items():

            def record(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                seen = inputs[0].abs().float().flatten(0, -2).amax(0)
                channels[name] = torch.maximum(channels.get(name, seen), seen)

            hooks.enter_context(layer.register_forward_pre_hook(record))
        for pixel_values in images:
            tower(pixel_values)
    for name, magnitudes in channels.items():
        if not magnitudes.isfinite().all():
            raise CheckpointError(
                f"the input of {name} is not finite in FP32. To see where that begins, run: trtower doctor CHECKPOINT"
            )
    form = FORMATS[precision]
    weights = {name: layer.weight.abs().float() for name, layer in layers.items()}
    smoothing = _smooth(channels, weights, form.smoothing)
    scales = {}
    for name, weight in weights.items():
        factors = smoothing.get(name)
        inputs = channels[name] if factors is None else channels[name] * factors
        smoothed = weight if factors is None else weight / factors
        scales[name] = Scales(
            input=float(_scale(inputs.max(), form)),
            weight=_scale(smoothed.amax(dim=1) if form.per_channel else smoothed.max(), form),
            smoothing=factors,
        )
    return scales


def _smooth(channels: Mapping[str, Tensor], weights: Mapping[str, Tensor], exponent: float | None) -> dict[str, Tensor]:
    """Return the smoothing of each layer, (I,); none without an exponent. Layers that read the same tensor share it."""
    if exponent is None:
        return {}
    readers: dict[bytes, list[str]] = {}
    for name, magnitudes in channels.items():
        readers.setdefault(magnitudes.cpu().numpy().tobytes(), []).append(name)
    smoothing: dict[str, Tensor] = {}
    for names in readers.values():
        inputs = channels[names[0]]
        columns = torch.stack([weights[name].amax(dim=0) for name in names]).amax(dim=0)
        inputs, columns = (each.clamp(min=LEAST_CHANNEL * each.max()) for each in (inputs, columns))
        factors = columns ** (1 - exponent) / inputs**exponent
        factors = torch.where(factors.isfinite() & (factors > 0), factors, 1.0)  # all inputs or weights may be zero
        smoothing |= dict.fromkeys(names, factors)
    return smoothing


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
        factors = torch.tensor(1.0) if scales.smoothing is None else scales.smoothing
        factors = factors.to(layer.weight.device)
        steps = scales.weight.reshape(-1, *([1] if scales.weight.ndim else []))
        layer.weight = nn.Parameter(_rounded(layer.weight.float() / factors, steps, form), requires_grad=False)

        def round_input(
            _: nn.Module, args: tuple[Tensor], factors: Tensor = factors, step: float = scales.input
        ) -> tuple[Tensor]:
            return (_rounded(args[0] * factors, torch.tensor(step), form),)

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

    ``modules`` maps nodes to the modules that they come from. Layers that read the same tensor with the same smoothing
    and scale share its quantised form, as queries, keys and values do.
    """
    form, graph = FORMATS[precision], model.graph
    zero: onnx_ir.Value | None = None  # says the type of 8 bits; opset 20 has no attribute for it
    quantised: dict[tuple[onnx_ir.Value, bytes, float], onnx_ir.Value] = {}
    for node in list(graph):
        module = modules.get(node, "")
        if node.op_type != "MatMul" or module not in scales:
            continue
        x, weight = node.inputs
        assert x and weight and weight.const_value and weight.dtype  # noqa: S101, PT018 - a linear layer has them
        half = weight.dtype
        scale = scales[module].input
        smoothing = scales[module].smoothing
        factors = None if smoothing is None else smoothing.numpy()
        key = (x, b"" if factors is None else factors.tobytes(), scale)
        if key not in quantised:
            wide = _insert(node, "Cast", [x], {"to": DataType.FLOAT}, DataType.FLOAT)
            if factors is not None:
                by = add_constant(graph, module + SMOOTHING, factors)
                wide = _insert(node, "Mul", [wide, by], {}, DataType.FLOAT)
            input_scale = add_constant(graph, module + INPUT_SCALE, np.array(scale, np.float32))
            zero = zero or add_constant(graph, ZERO_POINT, np.zeros((), form.onnx.numpy()), form.onnx)
            eight = _insert(node, "QuantizeLinear", [wide, input_scale, zero], {}, form.onnx)
            back = _insert(node, "DequantizeLinear", [eight, input_scale], {}, DataType.FLOAT)
            quantised[key] = _insert(node, "Cast", [back], {"to": half}, half)
        node.replace_input_with(0, quantised[key])
        steps = scales[module].weight.numpy()
        values = weight.const_value.numpy().astype(np.float32)  # (I, O)
        values = (values if factors is None else values / factors[:, None]) / steps  # by () or (O,)
        values = (values if form.dtype.is_floating_point else np.rint(values)).clip(-form.largest, form.largest)
        stored = add_constant(graph, module + WEIGHT, np.ascontiguousarray(values.astype(form.onnx.numpy())), form.onnx)
        weight_scale = add_constant(graph, module + WEIGHT_SCALE, np.ascontiguousarray(steps))
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
            dequantise = makers[makers[node.input[0]].input[0]]
            source = makers[makers[dequantise.input[0]].input[0]]
            scales[module] = Scales(
                input=float(numpy_helper.to_array(tensors[dequantise.input[1]])),
                weight=_read(tensors[module + WEIGHT_SCALE]),
                smoothing=_read(tensors[source.input[1]]) if source.input[-1].endswith(SMOOTHING) else None,
            )
    return scales


def _read(tensor: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


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
