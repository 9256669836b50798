"""Keep operations of a traced half-precision graph in FP32, with explicit casts.

A kept operation has its weights in FP32, computes in FP32 and passes FP32 on. A sum, scale, norm or activation that
reads the result also computes in FP32 and rounds its own result, so a number too large for FP16 exists only between the
kept operation and its reader. A matrix product that is not kept rounds its factors, and stays on the kernels for half
precision. Kept attention is spelled out, because its fused form has kernels only for half precision.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from trtower_export.graph.operations import (
    Operations,
    decompose_attention,
    evaluate,
    insert,
    is_cast,
    is_float,
    is_narrow,
)

aten = torch.ops.aten


def keep_fp32(program: ExportedProgram, kept: Collection[str], weights: Mapping[str, Tensor]) -> None:
    """Change ``program`` in place, so that the operations named in ``kept`` compute in FP32.

    ``weights`` are the tower's weights in FP32, by name. The attention of ``program`` must still be fused.
    """
    graph = program.graph_module.graph
    spelled_out = Operations(program, spelled_out=True)
    inside = [node for operation in spelled_out if operation.name in kept for node in operation.nodes]
    decompose_attention(graph, {node.meta["attention"] for node in inside if "attention" in node.meta})
    operations = Operations(program)
    wide = widened(operations, kept)
    narrow = next(node.meta["val"].dtype for node in operations.nodes if is_narrow(node))
    rounded: dict[fx.Node, fx.Node] = {}
    """The rounded result that other operations read, by the node that computed it in FP32."""

    for node in operations.nodes:
        operation = operations.of.get(node)
        if node.op == "placeholder":
            if is_narrow(node) and node in wide:
                _widen_weight(program, node, operations.weights.get(node.name, ""), weights)
            continue
        _read_rounded(operations, node, rounded)
        floats = [argument for argument in node.all_input_nodes if is_float(argument)]
        if node.op == "output":
            _cast_inputs(graph, node, floats, narrow)
            program.graph_signature.output_specs[0].arg.name = node.all_input_nodes[0].name
            continue
        if not is_cast(node) and (operation is not None or len({each.meta["val"].dtype for each in floats}) > 1):
            # All inputs get one dtype: FP32 if the node is wide or model code computes it in FP32, else half precision.
            _cast_inputs(graph, node, floats, torch.float32 if node in wide or not is_narrow(node) else narrow)
        if not floats:
            continue
        if is_cast(node) and is_narrow(node) and node in wide:  # model code's own cast back from FP32
            node.args = (node.args[0], torch.float32, *node.args[2:])
        if node.target == aten.linear.default and node in wide:
            node = _as_convolution(graph, node)
        node.meta["val"] = evaluate(node)
        if operation is not None and node in wide and operation.name not in kept:
            with graph.inserting_after(node):
                rounded[node] = insert(graph, node, aten._to_copy.default, node, dtype=narrow)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _widen_weight(program: ExportedProgram, node: fx.Node, name: str, weights: Mapping[str, Tensor]) -> None:
    """Replace a weight of the program by the tower's own in FP32."""
    node.meta["val"] = node.meta["val"].float()
    program.state_dict[name] = _like(program.state_dict[name], weights[name])


def _read_rounded(operations: Operations, node: fx.Node, rounded: Mapping[fx.Node, fx.Node]) -> None:
    """Let a node read the rounded results of other operations."""
    operation = operations.of.get(node)
    for argument in node.all_input_nodes:
        if argument in rounded and (operation is None or operations.of.get(argument) is not operation):
            node.replace_input_with(argument, rounded[argument])


def _cast_inputs(graph: fx.Graph, node: fx.Node, inputs: list[fx.Node], dtype: torch.dtype) -> None:
    """Cast the inputs of a node that have another dtype."""
    for argument in inputs:
        if argument.meta["val"].dtype != dtype:
            with graph.inserting_before(node):
                like = argument if node.op == "output" else node
                node.replace_input_with(argument, insert(graph, like, aten._to_copy.default, argument, dtype=dtype))


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach().float()
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _as_convolution(graph: fx.Graph, linear: fx.Node) -> fx.Node:
    """Turn a linear layer into a convolution of width 1, (B, T, D) -> (B, D, T) and back.

    TensorRT-RTX 1.7 refuses FP32 matrix products for Turing, but builds convolutions.
    """
    rows, weight, *bias = linear.args
    with graph.inserting_before(linear):
        columns = insert(graph, linear, aten.transpose.int, rows, 1, 2)
        kernel = insert(graph, linear, aten.unsqueeze.default, weight, -1)
        product = insert(graph, linear, aten.conv1d.default, columns, kernel, *bias)
        result = insert(graph, linear, aten.transpose.int, product, 1, 2)
    linear.replace_all_uses_with(result)
    return result


def widened(operations: Operations, kept: Collection[str]) -> frozenset[fx.Node]:
    """Return the nodes that compute in FP32 if the operations named in ``kept`` stay in FP32.

    These are the nodes of kept operations, and of operations that read their results, except matrix products and
    convolutions, which round what they read. Weights that only kept operations read are included, and so are nodes
    that only move FP32 numbers.
    """
    wide: set[fx.Node] = set()  # nodes whose value is FP32 inside their own operation
    leaving: set[fx.Node] = set()  # nodes whose value is FP32 for other operations
    for node in operations.nodes:
        operation = operations.of.get(node)
        if node.op == "placeholder":
            readers = operations.reading(operations.weights.get(node.name, ""))
            inside = leaves = bool(readers) and all(reader.name in kept for reader in readers)
        elif operation is None:
            inside = leaves = not leaving.isdisjoint(node.all_input_nodes)
        else:
            reads_fp32 = (
                argument in (wide if operations.of.get(argument) is operation else leaving)
                for argument in node.all_input_nodes
            )
            leaves = operation.name in kept
            inside = leaves or (any(reads_fp32) and not operation.multiplies)
        if inside:
            wide.add(node)
        if leaves:
            leaving.add(node)
    return frozenset(wide)
