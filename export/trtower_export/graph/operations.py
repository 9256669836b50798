"""Split a cut tower into named operations: one traced graph that is measured, rounded and exported.

The doctor, `--precision auto` and the ONNX file all refer to these nodes, so nothing has to be translated. A tower is
traced in half precision, because only then does model code show what it computes in FP32 anyway (the mean square of an
RMSNorm). An operation is named by the path of its module in the cut tower: `layers.3.mlp.fc1`. What a module computes
besides calling its children is named after the module and the computation: `layers.3.residual2`,
`layers.3.self_attn.scores`.
"""

import copy
import difflib
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram

from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BuildError, ConfigError
from trtower.spec import BatchProfile, TensorSpec

aten = torch.ops.aten

_MOVING = (
    "alias cat chunk clone contiguous detach dropout expand flatten full_like getitem lift_fresh_copy narrow ones_like "
    "permute repeat reshape select slice split split_with_sizes squeeze stack sym_size t to _to_copy transpose "
    "unbind unflatten unsqueeze view zeros_like"
)
MOVING = frozenset(_MOVING.split())
"""Functions that only move numbers: they round nothing, and pass FP32 on as FP32."""

FUSED = "scaled_dot_product_attention"

PRODUCTS = frozenset({"addmm", "bmm", "conv1d", "conv2d", "linear", "matmul", "mm", "scaled_dot_product_attention"})
"""Matrix products and convolutions."""

CASTS = frozenset({"to", "_to_copy"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Operation:
    """One operation: its nodes in the traced graph, and the weights that it reads.

    ``layer`` is None outside the layers. ``part`` is the name within the layer, or the whole name outside the layers.
    """

    name: str
    layer: int | None
    part: str
    nodes: tuple[fx.Node, ...]
    weights: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix product or a convolution, which fast kernels compute in half precision."""
        return any(opname(node) in PRODUCTS for node in self.nodes)


def trace(tower: nn.Module, input_: TensorSpec, batch: BatchProfile, dtype: str = "") -> ExportedProgram:
    """Cast ``tower`` in place to ``dtype``, by default the input's, and trace it with a dynamic batch."""
    example = torch.zeros((2, *input_.row), dtype=PIXEL_DTYPES[input_.dtype])
    # torch.export would make a batch of exactly 1 a constant, so the dimension goes up to at least 2.
    dynamic_shapes = {input_.name: {0: torch.export.Dim("batch", min=1, max=max(batch.max, 2))}}
    program = torch.export.export(
        tower.to(DTYPES[dtype or input_.dtype]), (example,), dynamic_shapes=dynamic_shapes, strict=False
    )
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target == aten._assert_tensor_metadata.default:  # it asserts dtypes, which islands change
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


class Operations(Sequence[Operation]):
    """The operations of a traced tower, in execution order.

    With ``spelled_out``, attention is decomposed in a copy of the graph, so that `scores` and `context` are operations.
    Otherwise, a fused attention is one operation.
    """

    def __init__(self, program: ExportedProgram, *, spelled_out: bool = False) -> None:
        graph, signature = program.graph_module.graph, program.graph_signature
        if spelled_out:
            graph = copy.deepcopy(graph)
            decompose_attention(graph)
        self.nodes = tuple(graph.nodes)
        self.weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        """The name of each weight, by the name of its placeholder."""
        self._all = tuple(self._name(self._group()))
        self.of = {node: operation for operation in self._all for node in operation.nodes}
        """The operation of each node; nodes that only move numbers have none."""
        self._reading: dict[str, list[Operation]] = {}
        for operation in self._all:
            for weight in operation.weights:
                self._reading.setdefault(weight, []).append(operation)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    @property
    def names(self) -> list[str]:
        """The names, in execution order."""
        return [operation.name for operation in self._all]

    def reading(self, weight: str) -> Sequence[Operation]:
        """List the operations that compute with a weight."""
        return self._reading.get(weight, ())

    def match(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Return the names that match ``patterns``: each a name, the path of a module around it, or either with `*`.

        Raises ConfigError with the nearest names if a pattern matches nothing.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            matched = {name for name in self.names if _matches(pattern, name)}
            if not matched:
                raise ConfigError(
                    f"{pattern!r} is not an operation of this tower; the nearest are {self._nearest(pattern)}. To list "
                    "all, run: trtower doctor CHECKPOINT --every"
                )
            chosen |= matched
        return tuple(name for name in self.names if name in chosen)

    def _nearest(self, pattern: str) -> str:
        general = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in self.names))
        choices = [*self.names, *general] if re.search(r"\.\d+\.", pattern) else [*general, *self.names]
        return ", ".join(difflib.get_close_matches(pattern, dict.fromkeys(choices), n=3, cutoff=0.0))

    def _group(self) -> Iterator[tuple[str, str, list[fx.Node]]]:
        """Yield each operation as a module's path, a word ("" if it is the whole module) and its nodes."""
        computing = [node for node in self.nodes if _computes(node)]
        paths = {module_path(node) for node in computing}
        compound = {path for path in paths if any(other.startswith(f"{path}.") for other in paths if path) or not path}
        groups: dict[str, list[fx.Node]] = {}
        residuals: set[fx.Node] = set()
        last: list[fx.Node] = []
        for node in computing:
            path = module_path(node)
            if path not in compound:
                if path not in groups:
                    groups[path] = []
                    yield path, "", groups[path]
                groups[path].append(node)
                last = []
                continue
            word = node.meta.get("part", "")
            if not word and opname(node) == "add" and self._is_residual(node, path, residuals):
                residuals.add(node)
                word = "residual"
            if last and module_path(last[-1]) == path and word in ("", last[-1].meta.get("part")):
                last.append(node)
                continue
            group = [node]
            last = [] if word == "residual" else group
            yield path, word or "elementwise", group

    def _is_residual(self, node: fx.Node, path: str, residuals: set[fx.Node]) -> bool:
        """Return whether a sum adds what entered its module, or an earlier such sum."""
        sources = [source for argument in node.all_input_nodes for source in _sources(argument)]
        return any(
            source in residuals or (_computes(source) and not module_path(source).startswith(path))
            for source in sources
        )

    def _name(self, groups: Iterable[tuple[str, str, list[fx.Node]]]) -> Iterator[Operation]:
        listed = list(groups)
        words = []
        for path, word, nodes in listed:
            if word == "elementwise" and len(nodes) == 1:
                word = "attention" if opname(nodes[0]) == FUSED else opname(nodes[0])
            words.append((path, word))
        times, numbered = Counter(words), Counter[tuple[str, str]]()
        weights = self._weights_by_node()
        for (path, word), (_, _, nodes) in zip(words, listed, strict=True):
            numbered[path, word] += 1
            number = str(numbered[path, word]) if times[path, word] > 1 else ""
            name = ".".join(filter(None, (path, word + number)))
            inside = re.match(r"layers\.(\d+)\.(.+)", name)
            read = [weight for node in nodes for weight in weights.get(node, ())]
            yield Operation(
                name=name,
                layer=int(inside[1]) if inside else None,
                part=inside[2] if inside else name,
                nodes=tuple(nodes),
                weights=tuple(dict.fromkeys(read)),
            )

    def _weights_by_node(self) -> dict[fx.Node, list[str]]:
        """Return the weights that each node computes with, directly or after other nodes moved them."""
        read: dict[fx.Node, list[str]] = {}
        for placeholder in self.nodes:
            if placeholder.op == "placeholder" and placeholder.name in self.weights:
                for reader in _readers(placeholder):
                    read.setdefault(reader, []).append(self.weights[placeholder.name])
        return read


def decompose_attention(graph: fx.Graph, which: Collection[str] | None = None) -> None:
    """Spell attention out, in place: Q x K / sqrt(d), softmax, times V. ``which`` limits it to nodes of these names.

    Scaling comes first, so that products of large queries and keys are as small as possible.
    """
    for node in list(graph.nodes):
        if opname(node) != FUSED or (which is not None and node.name not in which):
            continue
        query, key, value = node.args[:3]
        if len(node.args) > 3 or node.kwargs.keys() - {"scale"}:
            raise BuildError(f"attention {node.name} has a mask or a dropout, which no supported tower has.")
        scale = node.kwargs.get("scale") or query.meta["val"].shape[-1] ** -0.5
        with graph.inserting_before(node):
            scaled = insert(graph, node, aten.mul.Tensor, query, scale)
            transposed = insert(graph, node, aten.transpose.int, key, -2, -1)
            scores = insert(graph, node, aten.matmul.default, scaled, transposed)
            shares = insert(graph, node, aten.softmax.int, scores, -1)
            context = insert(graph, node, aten.matmul.default, shares, value)
            node.replace_all_uses_with(context)
        for inserted in (scaled, transposed, scores, shares, context):
            inserted.meta |= {"attention": node.name, "part": "context" if inserted is context else "scores"}
        graph.erase_node(node)


def insert(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call of ``target`` that belongs to the same module as ``like``."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {**like.meta, "val": evaluate(node)}
    return node


def evaluate(node: fx.Node) -> Any:
    """Run one node on the fake tensors of its arguments, through the dispatcher in Python, as torch's tracers do.

    In torch 2.11, which LeRobot pins, `matmul` in C++ would make the batch a constant.
    """
    args: Any = fx.node.map_arg(node.args, lambda argument: argument.meta["val"])
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda argument: argument.meta["val"])
    target: Any = node.target
    with enable_python_dispatcher():
        return target(*args, **kwargs)


def module_path(node: fx.Node) -> str:
    """Return the path, from the tower's root, of the module that a node was traced in."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return paths[-1] if paths else ""


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a tensor of floats."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_narrow(node: fx.Node) -> bool:
    """Whether a node's value was traced in half precision."""
    return is_float(node) and node.meta["val"].itemsize == 2


def is_cast(node: fx.Node) -> bool:
    """Whether a node only changes the dtype."""
    return node.op == "call_function" and opname(node) in CASTS


def _computes(node: fx.Node) -> bool:
    if node.op != "call_function" or not is_float(node):
        return False
    if opname(node) in CASTS:  # a cast back from FP32 in model code rounds
        return is_narrow(node) and not is_narrow(node.all_input_nodes[0])
    return opname(node) not in MOVING


def _readers(value: fx.Node) -> dict[fx.Node, None]:
    """Return the nodes that compute with a value, in order."""
    readers: dict[fx.Node, None] = {}
    for user in value.users:
        readers |= {user: None} if _computes(user) else _readers(user)
    return readers


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that computed the numbers of a node that only moves them."""
    if node.op != "call_function" or _computes(node):
        yield node
        return
    for argument in node.all_input_nodes:
        yield from _sources(argument)


def opname(node: fx.Node) -> str:
    """Return the name of the function that a node calls, such as "linear"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return "getitem" if target is operator.getitem else str(getattr(target, "__name__", target))


def _matches(pattern: str, name: str) -> bool:
    pattern_parts, parts = pattern.strip().split("."), name.split(".")
    return len(pattern_parts) <= len(parts) and all(map(fnmatchcase, parts, pattern_parts))
