"""What each ONNX operator of a bundle's graph is in PyTorch: one row of OPERATORS for each.

An operator is *emitted*: its function calls PyTorch through `call`, which adds a node to an fx graph, or computes at
once if everything it is given is constant. Values are constant tensors, nodes, or lists of integers, some of which may
be nodes: shapes are computed on the host, so that the GPU never waits for them.

To add an operator, write its function, with its attributes as keyword arguments, and add its row.
"""

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional

Value = Any
"""torch.Tensor | fx.Node | list[int | fx.Node]"""

Call = Callable[..., Value]

LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max


class UnknownOperatorError(Exception):
    """The map has no row for an operator in this form; the message says which form."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """How an operator is emitted, and the attributes that it may only have with certain values.

    ``emit`` takes `call`, the inputs, and every other attribute by its name. ``fixed`` maps an attribute to the values
    that it, or each of its elements, may have; None allows any, for an attribute that says nothing new.
    """

    emit: Callable[..., Value]
    fixed: Mapping[str, Collection[Any] | None] = field(default_factory=dict)


def _plain(function: Callable[..., Any]) -> Operator:
    """Return an operator that PyTorch has in the same form."""
    return Operator(emit=lambda call, *inputs: call(function, *inputs))


def integers(value: Value) -> list[Any]:
    """Return a shape, or a list of axes or sizes, as a list."""
    return value if isinstance(value, list) else [int(each) for each in value.flatten().tolist()]


def _attention(
    call: Call,
    query: Value,
    key: Value,
    value: Value,
    *,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    scale: float | None = None,
) -> Value:
    """Attend, as (B, N, D) if the heads are told, else as (B, heads, N, d)."""
    if q_num_heads != kv_num_heads:
        raise UnknownOperatorError(f"Attention with {q_num_heads} heads of queries and {kv_num_heads} of keys")
    if q_num_heads is None:
        return call(functional.scaled_dot_product_attention, query, key, value, scale=scale)
    heads = [
        call(torch.transpose, call(torch.unflatten, each, -1, (q_num_heads, -1)), 1, 2) for each in (query, key, value)
    ]
    context = call(functional.scaled_dot_product_attention, *heads, scale=scale)
    return call(torch.flatten, call(torch.transpose, context, 1, 2), -2)


def _average_pool(call: Call, x: Value, *, kernel_shape: list[int], strides: list[int]) -> Value:
    if len(kernel_shape) != 2:
        raise UnknownOperatorError(f"AveragePool over {len(kernel_shape)} dimensions")
    return call(functional.avg_pool2d, x, kernel_shape, strides)


def _clip(call: Call, x: Value, least: Value = None, most: Value = None) -> Value:
    return call(torch.clamp, x, least, most)


def _concat(call: Call, *values: Value, axis: int) -> Value:
    if any(isinstance(each, list) for each in values):
        return [size for each in values for size in integers(each)]
    return call(torch.cat, list(values), axis)


def _conv(call: Call, x: Value, weight: torch.Tensor, bias: Value = None, *, strides: list[int]) -> Value:
    """Multiply every patch, (B, C, G x P, ...) -> (B, D, G, ...): cuDNN would round FP32 to TF32 by default."""
    sides, dims = list(weight.shape[2:]), len(strides)
    if sides != strides:
        raise UnknownOperatorError(f"Conv with patches of {sides} every {strides}")
    for dim, side in enumerate(sides):
        axis = 2 + 2 * dim
        whole = call(operator.mul, call(operator.floordiv, call(torch.Tensor.size, x, axis), side), side)
        x = call(torch.unflatten, call(torch.narrow, x, axis, 0, whole), axis, (-1, side))
    grid, inside = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    patches = call(torch.flatten, call(torch.permute, x, [0, *grid, 1, *inside]), 1 + dims)
    features = call(torch.matmul, patches, weight.flatten(1).t())
    features = features if bias is None else call(torch.add, features, bias)
    return call(torch.movedim, features, -1, 1)


def _dequantize(call: Call, x: Value, scale: Value, zero: Value = None, *, axis: int = 1) -> Value:
    numbers = call(torch.Tensor.to, x, scale.dtype)
    if zero is not None:
        numbers = call(torch.sub, numbers, call(torch.Tensor.to, _along(x, zero, axis), scale.dtype))
    return call(torch.mul, numbers, _along(x, scale, axis))


def _quantize(call: Call, x: Value, scale: Value, zero: Value, *, axis: int = 1) -> Value:
    numbers = call(torch.div, call(torch.Tensor.to, x, torch.float32), _along(x, scale.float(), axis))
    if zero.dtype.is_floating_point:
        least, most = -LARGEST_FLOAT8, LARGEST_FLOAT8  # a cast alone would turn what is larger into NaN
    else:
        numbers = call(torch.add, call(torch.round, numbers), _along(x, zero.float(), axis))
        least, most = torch.iinfo(zero.dtype).min, torch.iinfo(zero.dtype).max
    return call(torch.Tensor.to, call(torch.clamp, numbers, least, most), zero.dtype)


def _along(x: Value, numbers: torch.Tensor, axis: int) -> torch.Tensor:
    """Shape the numbers of an axis of ``x`` so that they broadcast."""
    if numbers.numel() == 1:
        return numbers.reshape(())
    if isinstance(x, fx.Node):
        raise UnknownOperatorError("QuantizeLinear or DequantizeLinear of activations with a scale for each channel")
    return numbers.reshape([-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)])


def _expand(call: Call, x: Value, shape: Value) -> Value:
    # A 1 leaves the size that is there. For PyTorch that is -1, which it does not take for a dimension that is new.
    sizes = integers(shape)
    known = [1] * (len(sizes) - x.ndim) if isinstance(x, torch.Tensor) else []
    new = len(known)
    return call(torch.Tensor.expand, x, [*sizes[:new], *(-1 if size == 1 else size for size in sizes[new:])])


def _gather(call: Call, x: Value, indices: torch.Tensor, *, axis: int = 0) -> Value:
    if isinstance(indices, fx.Node) or bool((indices < 0).any()):
        raise UnknownOperatorError("Gather with computed or negative indices")
    if indices.ndim == 0:
        return call(torch.select, x, axis, int(indices))
    taken = call(torch.index_select, x, axis, indices.flatten())
    return call(torch.unflatten, taken, axis, tuple(indices.shape)) if indices.ndim > 1 else taken


def _gemm(call: Call, x: Value, weight: Value, bias: Value = None, *, transB: int = 0) -> Value:  # noqa: N803 - ONNX's
    product = call(torch.matmul, x, call(torch.t, weight) if transB else weight)
    return product if bias is None else call(torch.add, product, bias)


def _layer_norm(call: Call, x: Value, scale: Value, bias: Value = None, *, epsilon: float = 1e-5) -> Value:
    return call(functional.layer_norm, x, list(scale.shape), scale, bias, epsilon)


def _rms_norm(call: Call, x: Value, scale: Value, *, epsilon: float = 1e-5) -> Value:
    return call(functional.rms_norm, x, list(scale.shape), scale, epsilon)


def _reduce_l2(call: Call, x: Value, axes: Value, *, keepdims: int = 1) -> Value:
    return call(torch.linalg.vector_norm, x, 2, integers(axes), bool(keepdims))


def _reduce_mean(call: Call, x: Value, axes: Value, *, keepdims: int = 1) -> Value:
    return call(torch.mean, x, integers(axes), bool(keepdims))


def _reshape(call: Call, x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    sizes = integers(shape)
    if not allowzero:  # then 0 stands for the size that is there
        sizes = [call(torch.Tensor.size, x, dim) if size == 0 else size for dim, size in enumerate(sizes)]
    return call(torch.reshape, x, sizes)


def _shape(call: Call, x: Value, *, start: int, end: int) -> Value:
    return [call(torch.Tensor.size, x, dim) for dim in range(start, end)]


def _slice(call: Call, x: Value, starts: Value, ends: Value, axes: Value, steps: Value = None) -> Value:
    every = [integers(each) for each in (starts, ends, axes)]
    every.append([1] * len(every[0]) if steps is None else integers(steps))
    for start, end, axis, step in zip(*every, strict=True):
        if step < 1:
            raise UnknownOperatorError(f"Slice with a step of {step}")
        x = call(torch.ops.aten.slice.Tensor, x, axis, start, end, step)
    return x


def _split(call: Call, x: Value, sizes: Value = None, *, axis: int = 0, num_outputs: int = 0) -> Value:
    return call(torch.chunk, x, num_outputs, axis) if sizes is None else call(torch.split, x, integers(sizes), axis)


OPERATORS: Mapping[str, Operator] = {
    "Add": _plain(torch.add),
    "Attention": Operator(emit=_attention, fixed={"is_causal": (0,), "softcap": (0.0,), "qk_matmul_output_mode": (0,)}),
    "AveragePool": Operator(
        emit=_average_pool,
        fixed={"auto_pad": ("NOTSET",), "ceil_mode": (0,), "count_include_pad": None, "dilations": (1,), "pads": (0,)},
    ),
    "Cast": Operator(emit=lambda call, x, *, to: call(torch.Tensor.to, x, to), fixed={"saturate": (1,)}),
    "Clip": Operator(emit=_clip),
    "Concat": Operator(emit=_concat),
    "Conv": Operator(
        emit=_conv,
        fixed={"auto_pad": ("NOTSET",), "dilations": (1,), "group": (1,), "kernel_shape": None, "pads": (0,)},
    ),
    "DequantizeLinear": Operator(emit=_dequantize, fixed={"block_size": (0,), "output_dtype": (0,)}),
    "Div": _plain(torch.div),
    "Expand": Operator(emit=_expand),
    "Gather": Operator(emit=_gather),
    "Gelu": Operator(emit=lambda call, x, *, approximate="none": call(functional.gelu, x, approximate=approximate)),
    "Gemm": Operator(emit=_gemm, fixed={"alpha": (1.0,), "beta": (1.0,), "transA": (0,)}),
    "LayerNormalization": Operator(emit=_layer_norm, fixed={"axis": (-1,), "stash_type": (1,)}),
    "MatMul": _plain(torch.matmul),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Pow": _plain(torch.pow),
    "QuantizeLinear": Operator(emit=_quantize, fixed={"block_size": (0,), "output_dtype": (0,), "saturate": (1,)}),
    "RMSNormalization": Operator(emit=_rms_norm, fixed={"axis": (-1,), "stash_type": (1,)}),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL2": Operator(emit=_reduce_l2, fixed={"noop_with_empty_axes": (0,)}),
    "ReduceMean": Operator(emit=_reduce_mean, fixed={"noop_with_empty_axes": (0,)}),
    "Reshape": Operator(emit=_reshape),
    "Shape": Operator(emit=_shape),
    "Sigmoid": _plain(torch.sigmoid),
    "Slice": Operator(emit=_slice),
    "Softmax": Operator(emit=lambda call, x, *, axis=-1: call(torch.softmax, x, axis)),
    "Split": Operator(emit=_split),
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": Operator(emit=lambda call, x, axes: call(torch.squeeze, x, tuple(integers(axes)))),
    "Sub": _plain(torch.sub),
    "Tile": Operator(emit=lambda call, x, repeats: call(torch.tile, x, integers(repeats))),
    "Transpose": Operator(emit=lambda call, x, *, perm: call(torch.permute, x, perm)),
}
"""By the operator's name in ONNX. An attribute `to` arrives as a torch.dtype."""
