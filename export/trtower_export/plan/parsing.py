"""Which TensorRT can parse a graph: the operators and types that TensorRT learnt after 8.6, and when.

TensorRT-RTX from 1.5 on parses all of it; `make test-tensorrt` builds graphs with 1.5, 1.6 and 1.7.
"""

from pathlib import Path
from typing import NamedTuple

import onnx
from onnx import TensorProto

from trtower.errors import ConfigError
from trtower.flavour import is_before, parse_version
from trtower_export.console import Progress
from trtower_export.targets import Target


class Learnt(NamedTuple):
    """An operator or a type, the first TensorRT that parses it, and where that was read, on 2026-11-29."""

    version: str
    source: str


OPERATORS_MD = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
CHANGELOG = "https://github.com/NVIDIA/TensorRT/blob/main/CHANGELOG.md"

OLDEST = Learnt("10.3", "make test-tensorrt")
"""The oldest that has what trtower calls: strongly typed networks, which 10.0.1 has too, and contexts with scratch
memory of a known size, which it lacks."""

OPERATORS = {
    "Gelu": Learnt("10.0", OPERATORS_MD),
    "Attention": Learnt("10.14", CHANGELOG),
    "RMSNormalization": Learnt("10.15", CHANGELOG),
    "RotaryEmbedding": Learnt("10.15", CHANGELOG),
    "Swish": Learnt("11.0", CHANGELOG),
}
TYPES = {
    TensorProto.BFLOAT16: Learnt("10.0", CHANGELOG),
    TensorProto.FLOAT8E4M3FN: Learnt("10.0", CHANGELOG),
}
_OLD = (
    "Add AveragePool Cast Clip Concat Constant Conv Cos DequantizeLinear Div Equal Erf Exp Expand Flatten Gather Gemm "
    "Identity LayerNormalization MatMul Mul Neg Pow QuantizeLinear Range Reciprocal ReduceL2 ReduceMean Reshape Shape "
    "Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where"
)
OLD = frozenset(_OLD.split())
"""Operators that 8.6 parses already, by its own operators.md."""


class Parsers(NamedTuple):
    """The first TensorRT that parses a graph, what needs it, and the operators of which nothing is known."""

    first: str
    needs: str
    unknown: tuple[str, ...]


def find_parsers(path: Path) -> Parsers:
    """Find out which TensorRT can parse an ONNX graph, by its operators and the types of its weights."""
    graph = onnx.load_model(path, load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    needed = {"what trtower calls": OLDEST}
    needed |= {f"the operator {name}": OPERATORS[name] for name in sorted(operators & OPERATORS.keys())}
    types = {tensor.data_type for tensor in graph.initializer}
    needed |= {f"the type {TensorProto.DataType.Name(each)}": TYPES[each] for each in sorted(types & TYPES.keys())}
    needs = max(needed, key=lambda name: parse_version(needed[name].version))
    return Parsers(needed[needs].version, needs, tuple(sorted(operators - OPERATORS.keys() - OLD)))


def check_parsers(parsers: Parsers, target: Target | None, progress: Progress) -> None:
    """Refuse a graph that the TensorRT of ``target`` cannot parse, and warn of one that perhaps none can.

    Raises ConfigError.
    """
    if parsers.unknown:
        progress.say(f"no TensorRT is known to parse {', '.join(parsers.unknown)}: the build of a plan may fail")
    if target and target.tensorrt and is_before(target.tensorrt, parsers.first):
        raise ConfigError(
            f"{target.name} has TensorRT {target.tensorrt}, and the graph needs {parsers.first} or later, for "
            f"{parsers.needs}."
        )
