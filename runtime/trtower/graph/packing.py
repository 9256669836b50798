"""Lay out the weights of linear layers once as oneDNN's kernels read them; PyTorch would do it in every call.

The sums are the same, in another order.
"""

import platform
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from trtower.graph.fusion import Constants, replace

PROCESSORS = ("x86_64", "AMD64")
"""Where it was tried."""


def can_pack() -> bool:
    """Return whether this PyTorch has the operators, and was tried on this kind of processor."""
    has = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has and torch.backends.mkldnn.is_available() and platform.machine() in PROCESSORS


def pack_linears(graph: fx.Graph, constants: Constants, rows: int) -> None:
    """Pack every linear layer in place. ``rows`` is how many vectors a call mostly has; others run, too."""
    operators: Any = torch.ops.mkldnn
    for linear in graph.find_nodes(op="call_function", target=functional.linear):
        x, weight, bias = linear.args
        with torch.no_grad():
            constants[weight.target] = operators._reorder_linear_weight(constants[weight.target], rows)
        with graph.inserting_before(linear):
            arguments: Any = (x, weight, bias, "none", [], "")
            packed = graph.create_node("call_function", operators._linear_pointwise, arguments, name=linear.name)
        replace(graph, linear, packed, constants)
