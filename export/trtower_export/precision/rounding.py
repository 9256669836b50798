"""Run a traced tower in FP32 while some of its operations round to half precision.

The doctor measures with this model of half precision, and `--precision auto` searches with it. An operation multiplies
and adds in FP32, as tensor cores do, and rounds each result. The model is pessimistic where kernels may differ: it
rounds a product before the bias is added, rounds attention scores, and sums the squares of a LayerNorm in half
precision, although the graph asks for FP32 there (`stash_type`).

Attention in which nothing rounds runs fused, which is faster than spelled out; the two differ by FP32's rounding.

An operation that is kept in FP32 passes on an FP32 result. A sum, scale, norm or activation that reads it computes in
FP32 and rounds its own result. A matrix product rounds its factors first. `islands.py` writes the same into the graph.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, fx

from trtower_export.graph.islands import widened
from trtower_export.graph.operations import Operation, Operations, is_cast, is_narrow

aten = torch.ops.aten

FP16_RANGE = torch.finfo(torch.float16)
"""The range of FP16: its largest number is 65504, and its smallest with all digits is 6.1e-05."""


class Observer(Protocol):
    """A callback that receives every value that operations compute, before it is rounded."""

    def __call__(self, operation: Operation, numbers: Tensor, *, result: bool) -> None:
        """Receive values of ``operation``: its result if ``result``, else intermediate ones."""


Values: TypeAlias = dict[fx.Node, Tensor]


class Simulation:
    """A traced tower with FP32 weights, in which any operations can be rounded."""

    def __init__(self, operations: Operations, weights: Mapping[str, Tensor]) -> None:
        """``weights`` are parameters and buffers by name."""
        self.operations = operations
        self._weights = weights
        self._last_use = {argument: node for node in operations.nodes for argument in node.all_input_nodes}
        (self._input,) = (
            node for node in operations.nodes if node.op == "placeholder" and node.name not in operations.weights
        )
        (self._output,) = (node for node in operations.nodes if node.op == "output")

    def run(
        self,
        pixel_values: Tensor,
        *,
        rounded: Collection[str] = (),
        dtype: torch.dtype = torch.float16,
        observe: Observer | None = None,
        keep: Values | None = None,
    ) -> Tensor:
        """Run (B, 3, S, S) to (B, P + N, D), with weights and results of the operations in ``rounded`` in ``dtype``.

        ``observe`` is called with every value. ``keep`` receives every value except attention scores, for `rerun`.
        """
        values: Values = {self._input: pixel_values}
        rounded = frozenset(rounded)
        wide = widened(self.operations, frozenset(self.operations.names) - rounded) if rounded else frozenset()
        fused = self._fused(rounded) if observe is None else frozenset()
        for node in self.operations.nodes:
            if node.op == "output":
                break
            if node in fused:
                if _holds_scores(node):
                    continue
                values[node] = _attend(node, values)
            elif node is not self._input:
                values[node] = self._value(node, values, rounded, wide, dtype, observe)
            if keep is not None:
                if not _holds_scores(node):
                    keep[node] = values[node]
                continue
            for argument in node.all_input_nodes:
                if self._last_use[argument] is node:
                    values.pop(argument, None)
        return self._result(values)

    def rerun(self, kept: Values, operation: Operation, dtype: torch.dtype) -> Tensor:
        """Continue from ``kept``, the values of an exact run, with only ``operation`` in half precision."""
        alone, values, dirty = frozenset({operation.name}), dict(kept), set[fx.Node]()
        fused = self._fused(alone)
        for node in self.operations.nodes:
            if node.op == "output":
                break
            weight = node.op == "placeholder" and self.operations.weights.get(node.name) in operation.weights
            inside = self.operations.of.get(node) is operation
            if not weight and not inside and dirty.isdisjoint(node.all_input_nodes):
                continue
            dirty.add(node)
            if node in fused:
                if not _holds_scores(node):
                    values[node] = _attend(node, values)
                continue
            for argument in node.all_input_nodes:
                self._restore(argument, values)
            values[node] = self._value(node, values, alone, frozenset(), dtype, None)
        return self._result(values)

    def _fused(self, rounded: frozenset[str]) -> frozenset[fx.Node]:
        """Return the nodes of every attention in which nothing is rounded."""
        parts = [node for node in self.operations.nodes if "attention" in node.meta]
        of = self.operations.of
        rounds = {node.meta["attention"] for node in parts if node in of and of[node].name in rounded}
        return frozenset(node for node in parts if node.meta["attention"] not in rounds)

    def _restore(self, node: fx.Node, values: Values) -> None:
        """Recompute a value that an exact run did not keep."""
        if node not in values:
            for argument in node.all_input_nodes:
                self._restore(argument, values)
            values[node] = _call(node, values)

    def _value(
        self,
        node: fx.Node,
        values: Values,
        rounded: frozenset[str],
        wide: frozenset[fx.Node],
        dtype: torch.dtype,
        observe: Observer | None,
    ) -> Tensor:
        if node.op == "placeholder":
            return self._weight(node, rounded, dtype)
        operation = self.operations.of.get(node)
        if operation is None:
            moved: Tensor = _call(node, values)
            return moved
        last = node is operation.nodes[-1]

        def observed(numbers: Tensor, *, result: bool = False) -> Tensor:
            if observe:
                observe(operation, numbers, result=result)
            return numbers

        if operation.name in rounded and operation.multiplies and not wide.isdisjoint(node.all_input_nodes):
            factors = wide.intersection(node.all_input_nodes)
            values = values | {factor: values[factor].to(dtype).float() for factor in factors}
        if not is_narrow(node) or operation.name not in rounded:
            value: Tensor = _call(node, values, between=observed)
            observed(value, result=last)
            return value
        inside = node in wide  # it computes in FP32, and rounds what leaves it

        def round_(number: Tensor) -> Tensor:
            return observed(number) if inside else observed(number).to(dtype).float()

        value = _call(node, values, between=round_)
        observed(value, result=last)
        leaves = not inside or any(self.operations.of.get(user) is not operation for user in node.users)
        return value.to(dtype).float() if leaves else value

    def _weight(self, node: fx.Node, rounded: frozenset[str], dtype: torch.dtype) -> Tensor:
        name = self.operations.weights[node.name]
        value = self._weights[name]
        if not value.is_floating_point() or not is_narrow(node):
            return value
        readers = self.operations.reading(name)
        if readers and not any(reader.name in rounded for reader in readers):
            return value
        return value.to(dtype).float()

    def _result(self, values: Values) -> Tensor:
        (result,) = self._output.all_input_nodes
        return values[result]


def _call(node: fx.Node, values: Values, between: Callable[[Tensor], Tensor] = lambda number: number) -> Any:
    """Run one node in FP32; ``between`` gets the intermediate values of a half-precision kernel, and may round them."""
    if is_cast(node):
        return values[node.all_input_nodes[0]]
    args: Any = fx.node.map_arg(node.args, lambda argument: values[argument])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda argument: values[argument])

    if node.target == aten.linear.default and len(args) == 3:
        return between(aten.linear.default(*args[:2])) + args[2]
    if node.target == aten.layer_norm.default:
        return _layer_norm(*args, between=between)
    target: Any = node.target
    return target(*args, **kwargs)


def _attend(context: fx.Node, values: Values) -> Tensor:
    """Compute in one fused call, from queries, keys and values, an attention that `decompose_attention` spelled out."""
    shares, value = context.all_input_nodes
    scaled, transposed = shares.all_input_nodes[0].all_input_nodes
    (query,), (key,), scale = scaled.all_input_nodes, transposed.all_input_nodes, scaled.args[1]
    attended: Tensor = aten.scaled_dot_product_attention(values[query], values[key], values[value], scale=scale)
    return attended


def _layer_norm(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    between: Callable[[Tensor], Tensor],
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    count = torch.Size(shape).numel()
    centred = x - between(x.sum(dims, keepdim=True)) / count
    variance = between(centred.square().sum(dims, keepdim=True)) / count
    y = centred * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _holds_scores(node: fx.Node) -> bool:
    return node.meta.get("part") == "scores"
