"""Write a traced tower as ONNX, with the precision in the graph and a name on every node.

A bundle has one or two graphs over the same weights: GRAPH, and in half precision also FUSED_GRAPH, for ONNX
Runtime (see fusion.py). Each node is named after its module, and each hidden state after its index. This
makes a profile of the engine readable, and lets `trtower check --by-layer` find the hidden states.
"""

import ast
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir
import torch
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_ir import DataType
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import slice_split_rule
from torch.export import ExportedProgram

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA
from trtower.errors import BuildError
from trtower.installation.prismatic import PARTS
from trtower.spec import BY_DTYPE, HALVES, UINT8, TensorSpec
from trtower_export.graph.fusion import spell_out_attention, write_fused
from trtower_export.graph.pixels import CHANNELS

OPSET = 20
"""The newest opset that TensorRT 10.0 reads. It is the first with the operator Gelu."""

HIDDEN_STATE = "hidden_state."
"""The prefix of the names of hidden states in the graph; their index follows."""

Quantise: TypeAlias = Callable[[onnx_ir.Model, Mapping[onnx_ir.Node, str]], None]

SCOPES = "pkg.torch.onnx.name_scopes"
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""Where the exporter writes a node's modules, and what it writes for a node without one, such as the batch's size."""


def write_onnx(
    program: ExportedProgram,
    input_: TensorSpec,
    output: TensorSpec,
    folder: Path,
    *,
    islands: bool = False,
    quantise: Quantise | None = None,
) -> None:
    """Write a tower that `operations.trace` has traced as the graphs of a bundle, with their weights beside them.

    This spells out the attention of ``program``, in place. The same weights give the same bytes, because names of
    source files, which PyTorch writes into every node, are removed. With ``islands`` the graph may hold weights in FP32
    beside half precision; the mean and deviation of bytes are in FP32 in any case. ``quantise`` receives the graph and
    the module of every node, and may write 8 bits into the graph. Raises BuildError if the graph does not match
    ``input_`` and ``output``.
    """
    precision = BY_DTYPE[output.dtype]
    path = folder / GRAPH
    kinds = {precision.onnx} | ({onnx.TensorProto.FLOAT} if islands or quantise else set())
    spell_out_attention(program)
    with _quiet_exporter(), _without_slices_split():
        written = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_.name],
            output_names=[output.name],
            dynamic_shapes={input_.name: {0: str(input_.shape[0])}},
            verbose=False,
        )
        assert written is not None  # noqa: S101 - dynamo=True returns the program
        modules = _name(written.model)
        if quantise:
            quantise(written.model, modules)
        _look_up(written.model)
        _strip(written.model)
        _lay_out(written.model)
        written.save(path, external_data=True)
        for value in written.model.graph.initializers.values():
            value.const_value = None  # the exporter's own cycles would keep the weights in memory
    (folder / GRAPH_DATA).chmod(path.stat().st_mode)  # it was written readable only by its owner
    _check_contract(onnx.load_model(path, load_external_data=False).graph, input_, output, kinds)
    if precision.name in HALVES:
        write_fused(path, folder / FUSED_GRAPH)


def read_onnx(bundle: Bundle, graph: str = GRAPH) -> onnx.ModelProto:
    """Read a graph of a bundle with its weights, and verify both files. Raises BundleError.

    onnx would refuse weights that have a second hard link, which `cp -l` and `rsync --link-dest` make. Both files are
    compared with their sha256 instead.
    """
    model = onnx.load_model_from_string(bundle.read(graph))
    weights = bundle.map(GRAPH_DATA)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            place = ExternalDataInfo(tensor)
            start = place.offset or 0
            tensor.raw_data = weights[start : start + place.length] if place.length else weights[start:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def add_constant(graph: onnx_ir.Graph, name: str, array: Any, dtype: DataType = DataType.FLOAT) -> onnx_ir.Value:
    """Add an initialiser to a graph."""
    tensor = onnx_ir.Tensor(array, dtype=dtype, name=name)
    value = onnx_ir.Value(
        name=name, const_value=tensor, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(dtype)
    )
    graph.register_initializer(value)
    return value


def _name(model: onnx_ir.Model) -> dict[onnx_ir.Node, str]:
    """Name every node after its module, and hidden states after their index; return the module of each node.

    In a pair of towers each has a state of its own, with the tower's name after the index.
    """
    modules: dict[onnx_ir.Node, str] = {}
    uses = Counter[str]()
    states: dict[tuple[int, str], onnx_ir.Value] = {}
    for node in model.graph:
        if SCOPES in node.metadata_props:
            module = ["", "", *ast.literal_eval(node.metadata_props[SCOPES])][-2]
        else:  # the exporter made it from other nodes: it gets the module of its first input
            makers = (value.producer() for value in node.inputs if value is not None)
            module = next((modules[maker] for maker in makers if maker is not None), "")
        module = "" if module == NO_MODULE else module
        modules[node] = module
        name = f"{module}/{node.op_type}"
        uses[name] += 1
        node.name = name if uses[name] == 1 else f"{name}_{uses[name]}"
        inside = re.match(rf"(?:stem|layers\.(\d+))(?:\.({'|'.join(PARTS)}))?(?:\.|$)", module)
        if inside:
            index = 0 if inside[1] is None else int(inside[1]) + 1
            states[index, inside[2] or ""] = node.outputs[0]  # the module's last node wins
    for (index, tower), value in states.items():
        if not value.is_graph_output():
            value.name = f"{HIDDEN_STATE}{index}{tower and f'.{tower}'}"
    return modules


def _strip(model: onnx_ir.Model) -> None:
    """Remove what the exporter writes about its own sources."""
    graph = model.graph
    for item in (model, graph, *graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        item.metadata_props.clear()
        item.doc_string = None
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()


def _look_up(model: onnx_ir.Model) -> None:
    """Replace lookups of fixed rows in tables, as of position embeddings, by the rows.

    So these places are not read from the file of weights, which loading reads before its hash is known.
    """
    graph = model.graph
    for node in list(graph):
        table, rows = (*node.inputs, None, None)[:2]
        if node.op_type == "Gather" and table and rows and table.const_value and rows.const_value:
            found = np.take(table.const_value.numpy(), rows.const_value.numpy(), node.attributes.get_int("axis", 0))
            name = str(node.name if len(table.uses()) > 1 else table.name)
            (result,) = node.outputs
            uses = [*result.uses()]
            for read in {table, rows}:
                if len(read.uses()) == 1:
                    del graph.initializers[str(read.name)]
            value = add_constant(graph, name, found, table.const_value.dtype)
            for use in uses:
                use.node.replace_input_with(use.idx, value)
            graph.remove(node, safe=True)


def _lay_out(model: onnx_ir.Model) -> None:
    """Make every weight copy itself into row-major order just before it is written.

    The weights of linear layers are transposed views here, which numpy writes element by element: 5 s for ViT-L.
    """
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = _copied_when_written(value.const_value)


def _copied_when_written(tensor: onnx_ir.TensorProtocol) -> onnx_ir.LazyTensor:
    def row_major() -> onnx_ir.TensorProtocol:
        array = tensor.numpy()
        # torch transposes several times faster than numpy but does not know numpy's bfloat16, so both get integers.
        integers = torch.from_numpy(array.view(f"i{array.itemsize}")).contiguous().numpy()
        return onnx_ir.Tensor(integers.view(array.dtype), dtype=tensor.dtype)

    shape = onnx_ir.Shape(tensor.numpy().shape)
    return onnx_ir.LazyTensor(row_major, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _check_contract(graph: onnx.GraphProto, input_: TensorSpec, output: TensorSpec, kinds: Collection[int]) -> None:
    for values, expected in ((graph.input, input_), (graph.output, output)):
        tensors = [(value.name, value.type.tensor_type) for value in values]
        actual = [(name, tuple(d.dim_param or d.dim_value for d in t.shape.dim), t.elem_type) for name, t in tensors]
        if actual != [(expected.name, expected.shape, _onnx_type(expected))]:
            raise BuildError(
                f"the traced graph has {actual} (name, shape, ONNX type), but "
                f"{expected.name} {expected.shape} {expected.dtype} is expected."
            )
    floats = {each.onnx for each in BY_DTYPE.values()}
    # A projector may compute a vector in FP32 from weights: Gemma's norm multiplies by 1 + weight.
    of_head = {name for node in graph.node if node.name.startswith("head.") for name in node.input}
    for tensor in graph.initializer:
        may_differ = prod(tensor.dims) <= CHANNELS or (len(tensor.dims) == 1 and tensor.name in of_head)
        if tensor.data_type in floats and tensor.data_type not in kinds and not may_differ:
            raise BuildError(f"initialiser {tensor.name} is not {output.dtype}: the tower was not cast as a whole.")


def _onnx_type(tensor: TensorSpec) -> int:
    return int(onnx.TensorProto.UINT8) if tensor.dtype == UINT8 else BY_DTYPE[tensor.dtype].onnx


@contextmanager
def _without_slices_split() -> Iterator[None]:
    """Disable the one rule of the exporter's optimiser that compares every node with all others.

    The rule takes as long as all others together, a second for a ViT-L. It looks for two slices that halve a tensor at
    constants, and no tower here has such slices at that point.
    """
    rules = rewriter._DEFAULT_REWRITE_RULES
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule is not slice_split_rule)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's remarks on its own internals (torchvision, pytree)."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
