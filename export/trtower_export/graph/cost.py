"""Count a tower's layers and parameters, and the FLOP of one image.

The layers and parameters of a cut tower are counted in the ONNX file that was written, so the numbers show the result
of the cut and not its intention. FLOP are counted in PyTorch, for the full tower and the cut one. A multiply-add is two
FLOP. Matrix products, convolutions and attention count; norms, activations, softmax and sums do not.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trtower.bundle.manifest import TowerCost
from trtower.spec import PRECISIONS
from trtower_export.families import Family
from trtower_export.graph.pixels import CHANNELS
from trtower_export.graph.reference import UncutTower

WEIGHTS = {number for each in PRECISIONS.values() for number in (each.onnx, each.onnx_linear)}
"""The ONNX types that weights can have."""


def measure_module(model: nn.Module, family: Family, image_size: int) -> TowerCost:
    """Count a full tower as transformers runs it on S x S pixels: every layer, and the pooling head of a SigLIP.

    Parameters are counted as loaded: the position embeddings are those of the checkpoint, whatever S is.
    """
    states, flop = run_weightless(model, family.read_states, (1, CHANNELS, image_size, image_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TowerCost(layers=len(states) - 2, parameters=parameters, flop=flop)  # states 0 to L, and last_hidden_state


def measure_uncut(uncut: UncutTower) -> TowerCost:
    """Count a full tower, and the head that follows it, as far as the head is not a part of the tower."""
    spec = uncut.spec
    tower = measure_module(uncut.model, uncut.checkpoint.family, spec.image_size)
    if uncut.head is None or not uncut.own:
        return tower
    tokens = (1, spec.num_tokens - spec.first_read, spec.hidden_size)
    _, flop = run_weightless(uncut.head, lambda head, features: head(features), tokens)
    parameters = sum(parameter.numel() for parameter in uncut.own)
    return replace(tower, parameters=tower.parameters + parameters, flop=tower.flop + flop)


def count_flop(tower: nn.Module, image_size: int) -> int:
    """Count the FLOP of a cut tower in FP32 for one image of S x S pixels."""
    pixels = (1, CHANNELS, image_size, image_size)
    _, flop = run_weightless(tower, lambda twin, pixel_values: twin(pixel_values), pixels)
    return flop


def run_weightless(model: nn.Module, run: Callable[[Any, Tensor], Any], shape: tuple[int, ...]) -> tuple[Any, int]:
    """Run a copy of ``model`` that has shapes but no weights on an input of ``shape``; return the output and its FLOP.

    The copy uses fake tensors, because transformers' masks and rotations fail on the meta device.
    """
    tensors = (*model.parameters(), *model.buffers())
    with FakeTensorMode(allow_non_fake_inputs=True):
        weightless = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors}
        given = torch.empty(shape)
    twin = copy.deepcopy(model, weightless)
    # The counter misses fused attention on a CPU; spelled out, it is two matrix products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = run(twin, given)
    return output, counter.get_total_flops()


def measure_graph(path: Path, flop: int) -> TowerCost:
    """Count a tower in its ONNX file, without loading the weights. The cost that is returned includes ``flop``.

    Layers are counted by the names of nodes. A parameter is an element of a float initialiser, including tables that
    were computed from the grid. Single numbers are constants and do not count, nor do the scales of 8 bits. Vectors
    count each time they are read, because the exporter stores equal ones once, such as norms and biases of random
    weights.
    """
    graph = onnx.load_model(path, load_external_data=False).graph
    reads = Counter(name for node in graph.node for name in node.input)
    scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    scales |= {node.input[1] for node in graph.node if node.op_type == "Mul" and node.output[0] in rounded}
    named = (re.match(r"layers\.(\d+)\b", node.name) for node in graph.node)
    return TowerCost(
        layers=len({match[1] for match in named if match}),
        parameters=sum(
            prod(tensor.dims) * (reads[tensor.name] if len(tensor.dims) == 1 else 1)
            for tensor in graph.initializer
            if tensor.data_type in WEIGHTS and prod(tensor.dims) > 1 and tensor.name not in scales
        ),
        flop=flop,
    )
