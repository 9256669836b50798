"""What a vision model returns: the hidden states that a bundle holds, and placeholders that raise for all others.

A missing state raises as soon as it is used. It is never None, which model code would carry on with, nor any other
value.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import export_command, name_layers
from trtower.errors import ConfigError
from trtower.layer_codes import LAST, name_layer
from trtower.spec import TowerSpec

BACK = "trtower.uninstall(model) restores the eager tower"


class AbsentError(ConfigError, AttributeError):
    """A missing output was used.

    It is also an AttributeError, so that `hasattr` returns False: accelerate calls it to see what can be moved.
    """


class Absent:
    """Stands in for a tensor and raises when it is used. It can be passed around, as models and accelerate do."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise AbsentError(vars(self).get("_why", f"{name} is missing."))

    def __repr__(self) -> str:
        return f"<absent: {self._why}>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise in any torch function that receives an absent tensor."""
        raise ConfigError(next(_absent_among((args, kwargs)))._why)


def _refuse(absent: Absent, *_: Any) -> Any:
    raise ConfigError(absent._why)


for _operator in ("getitem", "len", "iter", "bool", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul"):
    setattr(Absent, f"__{_operator}__", _refuse)


def _absent_among(value: Any) -> Iterator[Absent]:
    if isinstance(value, Absent):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _absent_among(item)


class Held(Sequence[Any]):
    """A sequence that raises when an absent item is indexed, but yields every item, absent or not, when iterated.

    It is not a tuple, because torch.compile takes every item out of a tuple to guard it.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        item = self._items[index]
        return _refuse(item) if isinstance(item, Absent) else item

    def __repr__(self) -> str:
        return repr(self._items)


def served_layers(spec: TowerSpec, depth: int) -> dict[int, int]:
    """Map each hidden state that a bundle can serve, for a tower of ``depth`` layers, to the bundle's state for it.

    A bundle with a head serves none.

    Both are hidden-state indices, not positions in ``spec.layers``. They differ only where two indices mean the same
    state. The tower has fewer layers than the checkpoint if model code dropped the layers that it does not read.
    """
    if spec.head:
        return {}
    last = spec.num_layers + 1
    served = {layer: layer for layer in spec.layers if layer <= spec.num_layers}
    if last in spec.layers and depth == spec.num_layers:
        served[last] = last
    if not spec.naming.final_norm and depth == spec.num_layers:  # two names for one state
        served |= {depth: served[last]} if last in served else {}
        served |= {last: served[depth]} if depth in served else {}
    return served


class Outputs:
    """Makes what a vision model of ``num_layers`` layers returns from the states that a bundle holds.

    ``instead`` tells, in the error for an absent state, another way to get it. ``carried``: what a head made of the
    states comes along with them (see installation/carried.py), so a bundle with a head has them, too.
    """

    def __init__(self, bundle: Bundle, num_layers: int, instead: str | None = BACK, *, carried: bool = False) -> None:
        spec, path = bundle.manifest.spec, bundle.path
        served = served_layers(replace(spec, head=None) if carried else spec, num_layers)
        self._columns = {layer: spec.columns([held])[0] for layer, held in served.items()}
        self._num_layers = num_layers
        last = num_layers + 1
        held = [name_layer(layer, num_layers) for layer in sorted(served) if layer <= num_layers] or [LAST]
        held = [f"the output of its {spec.head.describe()}"] if spec.head else held
        self._absent = {}
        for layer in set(range(last + 1)) - served.keys():
            what = LAST if layer == last else f"hidden state {layer} of {num_layers} layers"
            ways = [instead] if instead else []
            # No checkpoint can supply the last_hidden_state of a tower whose last layers were dropped.
            if layer <= num_layers or num_layers == spec.num_layers:
                layers = [*({} if spec.head else name_layers(spec, spec.layers)), name_layer(layer, num_layers)]
                ways.append(f"export that state too: {export_command(bundle, layers, spec.image_size)}")
            self._absent[layer] = Absent(
                f"{what} was requested, but the bundle {path} contains only {', '.join(held)}. {'; or '.join(ways)}"
            )

    def hidden_states(self, tokens: Tensor) -> Sequence[Any]:
        """Return L + 1 entries, each a state (B, P + N, D) or absent; a plain tuple if none is absent."""
        states = tuple(self._state(tokens, layer) for layer in range(self._num_layers + 1))
        return Held(states) if any(isinstance(each, Absent) for each in states) else states

    def last_hidden_state(self, tokens: Tensor) -> Any:
        """Return `last_hidden_state` (B, P + N, D), or its absent placeholder."""
        return self._state(tokens, self._num_layers + 1)

    def _state(self, tokens: Tensor, layer: int) -> Any:
        return tokens[..., self._columns[layer]] if layer in self._columns else self._absent[layer]


POOLER_OUTPUT = Absent(f"pooler_output, one vector per image, was requested, but no bundle holds it. {BACK}.")
"""The placeholder for `pooler_output`; models assign their features to that field."""
