"""Compare every hidden state of a bundle's graph with PyTorch's, up to the one that is read.

The states have names in the graph (see `onnx_graph.py`). A copy of the graph that also returns them runs on the CPU. A
plan returns only its output, so this always compares the graph, whatever the check ran.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from onnx import helper
from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Figures, LayerFigures
from trtower.dtypes import PIXEL_DTYPES
from trtower.errors import BundleError
from trtower.installation.prismatic import PARTS
from trtower.parity.metrics import MetricSums
from trtower_export.check.emulation import open_session, read_emulated
from trtower_export.graph.onnx_graph import HIDDEN_STATE, read_onnx

JUMP = 3.0
"""An error that grows by more than this factor is a jump, unless PyTorch's own grows as fast. Rounding adds up: on a
pretrained ViT-S/14 in FP16 the error grew at most 1.9 times from one state to the next (PyTorch's 1.1 times there)."""

ROUNDING = 1e-3
"""The relative error of hidden state 0 that rounding may cause in every precision except BF16. The limit for the first
state is a multiple of this, or of PyTorch's own error if that is larger: PyTorch's own may be zero there."""

EXACT = 1e-6
"""The relative error of FP32 arithmetic; smaller errors count as this."""


class GraphStates:
    """A bundle's graph that returns every hidden state it computes."""

    def __init__(self, bundle: Bundle, *, emulated: bool) -> None:
        manifest = bundle.manifest
        model = read_emulated(bundle) if emulated else read_onnx(bundle)
        computed = {name for node in model.graph.node for name in node.output}
        named = re.compile(rf"{HIDDEN_STATE}\d+(\.({'|'.join(PARTS)}))?")
        names = sorted(name for name in computed if named.fullmatch(name))
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
        self._session = open_session(model)
        self._input, self._least = manifest.input.name, manifest.batch.min
        spec = manifest.spec
        self._num_patches = spec.num_patches
        self._names = _of_pair(names) if spec.towers else {_index(name): (name,) for name in names}
        expected = set(range(spec.depth + 1))
        if spec.head:  # a final norm has no name of its own
            expected -= {spec.num_layers + 1}
        elif len(spec.layers) == 1:  # if one state is read, it has the name of the output
            (read,) = spec.layers
            self._names[read] = (manifest.output.name,)
            expected -= {read - 1} if read > spec.depth else set()  # without a norm, last_hidden_state is state L
        if absent := expected - self._names.keys():
            raise BundleError(
                f"the graph of {bundle.path} has no hidden state {min(absent)}: export it again with --overwrite."
            )
        self._dtype = PIXEL_DTYPES[manifest.input.dtype]
        self._widens = emulated and spec.takes_floats

    def run(self, pixel_values: Tensor) -> dict[int, Tensor]:
        """Run one image, as the engine takes it, and return its hidden states (1, P + N, width) by index, in FP32."""
        batch = pixel_values.repeat(self._least, 1, 1, 1).to(self._dtype)
        batch = batch.float() if self._widens else batch
        names = sorted({name for names in self._names.values() for name in names})
        values = self._session.run(names, {self._input: batch.numpy()})
        states = {name: torch.from_numpy(value[:1]).float() for name, value in zip(names, values, strict=True)}
        return {index: self._join([states[name] for name in names]) for index, names in self._names.items()}

    def _join(self, states: Sequence[Tensor]) -> Tensor:
        """Put the patches of a pair's towers side by side; return a tower's state as it is."""
        if len(states) == 1:
            return states[0]
        return torch.cat([state[:, state.shape[1] - self._num_patches :] for state in states], dim=-1)


def _index(name: str) -> int:
    return int(name.removeprefix(HIDDEN_STATE).partition(".")[0])


def _of_pair(names: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """Return the states of both towers by their index; before its first layer a tower's state 0 stays."""
    states: dict[int, tuple[str, ...]] = {}
    held = [f"{HIDDEN_STATE}0.{tower}" for tower in PARTS]
    for index in range(1 + max(map(_index, names), default=-1)):
        later = [f"{HIDDEN_STATE}{index}.{tower}" for tower in PARTS]
        held = [new if new in names else old for new, old in zip(later, held, strict=True)]
        states[index] = tuple(held)
    return states


@dataclass
class LayerSums:
    """Sums for the figures of every layer, over any number of images."""

    images: list[str] = field(default_factory=list)
    bundle: dict[int, MetricSums] = field(default_factory=lambda: defaultdict(MetricSums))
    torch: dict[int, MetricSums] = field(default_factory=lambda: defaultdict(MetricSums))

    def add(
        self,
        name: str,
        reference: Sequence[Tensor],
        states: Mapping[int, Tensor],
        own: Sequence[Tensor],
        towers: Sequence[int] = (),
    ) -> None:
        """Add an image: its states from FP32 PyTorch, from the graph, and from PyTorch in the bundle's precision.

        ``towers`` are the widths of those of a pair.
        """
        self.images.append(name)
        for index, state in states.items():
            place = min(index, len(own) - 1)  # last_hidden_state is the last
            self.bundle[index].add(MetricSums.of(state, reference[index], towers))
            self.torch[index].add(MetricSums.of(own[place].float().cpu(), reference[index], towers))

    def figures(self) -> tuple[LayerFigures, ...]:
        """Compute the figures of every layer, in order."""
        return tuple(self._of_layer(index) for index in sorted(self.bundle))

    def _of_layer(self, index: int) -> LayerFigures:
        errors = torch.stack(self.bundle[index].token_errors).nan_to_num(nan=float("inf"))  # (images, tokens)
        image, token = divmod(int(errors.argmax()), errors.shape[1])
        return LayerFigures(
            layer=index,
            bundle=self.bundle[index].figures(),
            torch=self.torch[index].figures(),
            worst_image=self.images[image],
            worst_token=token,
        )


def first_jump(layers: Sequence[LayerFigures]) -> LayerFigures | None:
    """Find the first layer whose error is out of proportion to the layer before; None if there is none.

    If PyTorch's own half precision jumps as much, the layer is hard and the graph is not wrong. That is not a jump, as
    long as the result is finite.
    """
    if layers and _error(layers[0].bundle) > JUMP * max(ROUNDING, _error(layers[0].torch)):
        return layers[0]
    jumps = (
        layer
        for before, layer in pairwise([*layers[:1], *layers])
        if layer.bundle.relative_error is None
        or _error(layer.bundle) / _error(before.bundle) > JUMP * max(1.0, _own_growth(before, layer))
    )
    return next(jumps, None)


def _own_growth(before: LayerFigures, layer: LayerFigures) -> float:
    """Return the factor by which PyTorch's error grows, measured from the larger of both errors before.

    With 8 bits PyTorch's stem is exact, so its own error before may be 0. If PyTorch overflows, the factor is 1:
    the bundle need not overflow.
    """
    if before.torch.relative_error is None or layer.torch.relative_error is None:
        return 1.0
    return _error(layer.torch) / max(_error(before.torch), _error(before.bundle))


def _error(figures: Figures) -> float:
    return math.inf if figures.relative_error is None else max(figures.relative_error, EXACT)
