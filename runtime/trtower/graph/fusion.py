"""Replace what ONNX spells out by PyTorch's fused functions: linear layers, attention, and linear layers of one input.

A fused function rounds once where the graph rounds after each step, as the model's own code does in PyTorch.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

Constants = dict[str, torch.Tensor]


def fuse(graph: fx.Graph, constants: Constants) -> None:
    """Fuse what can be fused, in place. ``constants`` holds the weights, by the names that the graph reads."""
    for node in graph.find_nodes(op="call_function", target=torch.matmul):
        _fuse_linear(graph, node, constants)
    for node in graph.find_nodes(op="call_function", target=torch.softmax):
        _fuse_attention(graph, node, constants)
    together: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=functional.linear):
        x, weight, bias = _arguments(node)
        together.setdefault((x, constants[weight.target].dtype, bias is None), []).append(node)
    for linears in together.values():
        if len(linears) > 1:
            _merge(graph, linears, constants)


def _fuse_linear(graph: fx.Graph, product: fx.Node, constants: Constants) -> None:
    """Turn x @ weight + bias, or x @ weight, into a linear layer, whose weight has a row for each feature."""
    x, weight = _arguments(product)
    if not _is_constant(weight, 2, constants):
        return
    last, bias = product, None
    if (user := _only_reader(product, torch.add)) and _is_constant(other := _other(user, product), 1, constants):
        last, bias = user, other
    with graph.inserting_before(last):
        transposed = constants[weight.target].t()
        if transposed.is_cuda:  # a GPU's kernels prefer the summed dimension last; a CPU's do not care
            transposed = transposed.contiguous()
        rows = _add_constant(graph, f"{weight.target}_rows", transposed, constants)
        linear = graph.create_node("call_function", functional.linear, (x, rows, bias), name=product.name)
    replace(graph, last, linear, constants)


def _fuse_attention(graph: fx.Graph, softmax: fx.Node, constants: Constants) -> None:
    """Turn softmax(query * scale @ keys) @ value, with keys (B, heads, d, N), into one call."""
    scores, axis = _arguments(softmax)
    if axis != -1 or not _calls(scores, torch.matmul) or len(scores.users) > 1:
        return
    scaled, keys = _arguments(scores)
    context = _only_reader(softmax, torch.matmul)
    if context is None or context.args[0] is not softmax or not _calls(scaled, torch.mul):
        return
    scale = next((each for each in scaled.args if isinstance(each, float)), None)
    query = next((each for each in scaled.args if isinstance(each, fx.Node)), None)
    if scale is None or query is None:
        return
    with graph.inserting_before(context):
        key = graph.call_function(torch.transpose, (keys, -2, -1))
        fused = graph.create_node(
            "call_function",
            functional.scaled_dot_product_attention,
            (query, key, context.args[1]),
            {"scale": scale},
            name=softmax.name,
        )
    replace(graph, context, fused, constants)


def _merge(graph: fx.Graph, linears: Sequence[fx.Node], constants: Constants) -> None:
    """Compute several linear layers of one input, such as query, key and value, in one product."""
    x, first, bias = _arguments(linears[0])
    weights = [constants[_arguments(node)[1].target] for node in linears]
    with graph.inserting_before(linears[0]):
        rows = _add_constant(graph, f"{first.target}_merged", torch.cat(weights), constants)
        if bias is not None:
            biases = [constants[_arguments(node)[2].target] for node in linears]
            bias = _add_constant(graph, f"{bias.target}_merged", torch.cat(biases), constants)
        merged = graph.call_function(functional.linear, (x, rows, bias))
        parts = graph.call_function(torch.split, (merged, [len(each) for each in weights], -1))
        pieces = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(linears))]
    for linear, piece in zip(linears, pieces, strict=True):
        replace(graph, linear, piece, constants)


def _arguments(node: fx.Node) -> Any:
    return node.args


def _add_constant(graph: fx.Graph, name: str, value: torch.Tensor, constants: Constants) -> fx.Node:
    while name in constants:
        name += "_"
    constants[name] = value
    return graph.get_attr(name)


def replace(graph: fx.Graph, old: fx.Node, new: fx.Node, constants: Constants) -> None:
    """Let ``new`` take the place of ``old``, and free what only ``old`` read."""
    old.replace_all_uses_with(new)
    unread = [old]
    while unread:
        node = unread.pop()
        if node.users or node.op == "placeholder":
            continue
        sources = node.all_input_nodes
        graph.erase_node(node)
        if node.op == "get_attr":
            del constants[str(node.target)]
        unread += sources


def _is_constant(value: Any, dimensions: int, constants: Constants) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and constants[str(value.target)].ndim == dimensions


def _calls(value: Any, function: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is function


def _only_reader(node: fx.Node, function: Any) -> fx.Node | None:
    """Return the node that alone reads ``node``, if it calls ``function``."""
    (reader, *others) = node.users
    return reader if not others and reader.target is function else None


def _other(addition: fx.Node, summand: fx.Node) -> Any:
    return next((each for each in addition.args if each is not summand), None)
