"""The two forms of a graph: with attention and RMS norms spelled out for TensorRT, and fused for ONNX Runtime.

TensorRT's parser knows the operator Attention only from 10.14 on, and RMSNormalization from 10.15 on, but TensorRT
fuses what is spelled out. ONNX Runtime does not: its fast kernels are for these operators. benchmarks/README.md has
what was measured.
"""

from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter import onnx_fusions
from torch.export import ExportedProgram

from trtower_export.graph.operations import decompose_attention, insert, is_narrow, opname

aten = torch.ops.aten

FUSED_OPSET = 23
"""The first opset with the operators Attention and RMSNormalization."""

SPLIT: tuple[int, ...] = (0, 2, 1, 3)
SPLIT_KEYS: tuple[int, ...] = (0, 2, 3, 1)
TRANSPOSE_KEYS: tuple[int, ...] = (0, 1, 3, 2)
"""Permutations: from (B, N, heads, d) to (B, heads, N, d) and back, to (B, heads, d, N), and between the latter two."""


def spell_out_attention(program: ExportedProgram) -> None:
    """Spell out what attention is still fused in a traced tower, in place.

    Half precision has no exact 1 / sqrt(d) for a head size such as 72, and a wrong factor would change all scores
    alike. Queries are then scaled in FP32 and rounded once.
    """
    graph = program.graph_module.graph
    decompose_attention(graph)
    for node in list(graph.nodes):
        if "attention" not in node.meta or opname(node) != "mul" or not is_narrow(node):
            continue
        query, scale = node.args
        dtype = node.meta["val"].dtype
        if torch.tensor(scale, dtype=dtype).item() == scale:
            continue
        with graph.inserting_before(node):
            wide = insert(graph, node, aten._to_copy.default, query, dtype=torch.float32)
            scaled = insert(graph, node, aten.mul.Tensor, wide, scale)
            node.replace_all_uses_with(insert(graph, node, aten._to_copy.default, scaled, dtype=dtype))
        graph.erase_node(node)
    program.graph_module.recompile()


def write_fused(source: Path, target: Path) -> None:
    """Copy an ONNX graph of half precision, fused; both graphs share the file of the weights.

    An Attention node reads and writes (B, N, D) if only a reshape and a transpose split the heads, else
    (B, heads, N, d). Attention that computes in FP32 stays spelled out.
    """
    model = onnx_ir.load(source)
    for node in list(model.graph):
        if node.op_type == "Softmax" and node.outputs[0].dtype != onnx_ir.DataType.FLOAT:
            _fuse_attention(model.graph, node)
    model.graph.opset_imports[""] = FUSED_OPSET
    onnx_fusions.fuse(model)  # RMS norms, as the exporter does at this opset
    _widen_norms(model)
    RemoveUnusedNodesPass()(model)
    onnx_ir.save(model, target)


def _widen_norms(model: onnx_ir.Model) -> None:
    """Name every RMSNormalization, and cast its input to FP32 if its weights are.

    The fusion includes the model's own cast in the node. The result then has the type of the weights, but ONNX Runtime
    1.32 and onnx 1.23 assume the type of the input.
    """
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            node.name = f"{node.outputs[0].name}/{node.op_type}"
            x, scale = _input(node), _input(node, 1)
            if scale.dtype is not None and x.dtype != scale.dtype:
                cast = onnx_ir.node("Cast", [x], attributes={"to": scale.dtype}, name=f"{node.name}/Cast")
                cast.outputs[0].type, cast.outputs[0].shape = scale.type, x.shape
                model.graph.insert_before(node, cast)
                node.replace_input_with(0, cast.outputs[0])


def _fuse_attention(graph: onnx_ir.Graph, softmax: onnx_ir.Node) -> None:
    """Replace the attention around a Softmax, if it has the form of `spell_out_attention`."""
    scores, context = _maker(_input(softmax), "MatMul"), _reader(softmax.outputs[0], "MatMul")
    if scores is None or context is None:
        return
    scaled, keys, value = _input(scores), _input(scores, 1), _input(context, 1)
    rounding = _maker(scaled, "Cast")  # after scaling in FP32
    product = _maker(_input(rounding) if rounding else scaled, "Mul")
    scale = onnx_ir.convenience.get_const_tensor(_input(product, 1)) if product else None
    if product is None or scale is None:
        return
    widening = _maker(_input(product), "Cast") if rounding else None
    query = _input(widening or product)
    attributes: dict[str, float] = {"scale": float(scale.numpy().item())}
    whole = [_before_split(query, SPLIT), _before_split(keys, SPLIT_KEYS), _before_split(value, SPLIT)]
    last = _merging(context)
    if last and all(whole):
        inputs: list[onnx_ir.Value | None] = whole
        attributes |= dict.fromkeys(("q_num_heads", "kv_num_heads"), _shape(query)[1])
    else:
        last = context
        inputs = [query, _transposed_back(graph, last, keys), value]
    name = str(softmax.name).replace("/Softmax", "/Attention")
    fused = onnx_ir.node("Attention", inputs, attributes=attributes, name=name)
    graph.insert_before(last, fused)
    old, (new,) = last.outputs[0], fused.outputs
    new.type, new.shape, new.name = old.type, old.shape, f"{name}.output"
    onnx_ir.convenience.replace_all_uses_with(old, new)


def _before_split(value: onnx_ir.Value, permutation: tuple[int, ...]) -> onnx_ir.Value | None:
    """Return the (B, N, D) that a reshape and a transpose split into heads; None if something else made ``value``."""
    transpose = _maker(value, "Transpose")
    if transpose is None or _permutation(transpose) != permutation:
        return None
    reshape = _maker(_input(transpose), "Reshape")
    return _input(reshape) if reshape and len(_shape(_input(reshape))) == 3 else None


def _transposed_back(graph: onnx_ir.Graph, before: onnx_ir.Node, keys: onnx_ir.Value) -> onnx_ir.Value:
    """Return the keys as (B, heads, N, d), computed in front of a node unless they exist."""
    permutation = TRANSPOSE_KEYS
    if transpose := _maker(keys, "Transpose"):
        keys, done = _input(transpose), _permutation(transpose)
        permutation = tuple(done[axis] for axis in TRANSPOSE_KEYS)
    if permutation == tuple(range(4)):
        return keys
    node = onnx_ir.node("Transpose", [keys], attributes={"perm": permutation}, name=f"{before.name}/Transpose")
    graph.insert_before(before, node)
    node.outputs[0].name = f"{node.name}.output"
    return node.outputs[0]


def _merging(context: onnx_ir.Node) -> onnx_ir.Node | None:
    """Return the reshape that merges the heads of a result again, to (B, N, D); None if something else reads it."""
    result = context.outputs[0]
    reshape = _reader(result, "Reshape")
    if reshape and reshape.outputs[0].shape == result.shape:  # the exporter's, which changes nothing
        result = reshape.outputs[0]
    transpose = _reader(result, "Transpose")
    if transpose is None or _permutation(transpose) != SPLIT:
        return None
    merging = _reader(transpose.outputs[0], "Reshape")
    return merging if merging and len(_shape(merging.outputs[0])) == 3 else None


def _input(node: onnx_ir.Node, index: int = 0) -> onnx_ir.Value:
    value = node.inputs[index]
    assert value is not None  # noqa: S101 - none of these operators has optional inputs
    return value


def _shape(value: onnx_ir.Value) -> tuple[Any, ...]:
    return tuple(value.shape or ())


def _permutation(transpose: onnx_ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes["perm"].as_ints())


def _maker(value: onnx_ir.Value, operator: str) -> onnx_ir.Node | None:
    """Return the node that computed a value, if it is such an operator."""
    node = value.producer()
    return node if node is not None and node.op_type == operator else None


def _reader(value: onnx_ir.Value, operator: str) -> onnx_ir.Node | None:
    """Return the only node that reads a value, if it is such an operator."""
    nodes = value.consumers()
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == operator else None
