"""What a vision model of transformers returns, where a bundle holds some of its states: those, and an error for others.

Whatever is not there raises when it is read and is never None, which model code would carry on with.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trtower.errors import ConfigError
from trtower.layer_codes import LAST


class Held(tuple[Any, ...]):
    """A tuple whose absent items, which are None, raise when they are read; ``why`` says the reason of an index."""

    why: Callable[[int], str]

    def __new__(cls, items: Any, why: Callable[[int], str]) -> "Held":
        """Make one of ``items``."""
        held = super().__new__(cls, items)
        held.why = why
        return held

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        item = super().__getitem__(index)
        if item is None:
            raise ConfigError(self.why(index % len(self)))
        return item

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> Any:
        return tuple, (list(self),)


def hold_states(states: Mapping[int, Tensor], num_layers: int, bundle: str) -> Held:
    """Make `hidden_states` of L + 1 entries of those that there are; ``bundle`` is the path of what gives them."""
    indices = range(num_layers + 1)
    return Held(map(states.get, indices), lambda index: _why_no_state(index, states, num_layers, bundle))


def check_states(codes: Iterable[int], held: Collection[int], num_layers: int, bundle: str) -> None:
    """Raise ConfigError naming the first of the codes that is no state, or none that is held."""
    for layer in codes:
        if not -num_layers - 1 <= layer <= num_layers or layer % (num_layers + 1) not in held:
            raise ConfigError(_why_no_state(layer, held, num_layers, bundle))


def _why_no_state(layer: int, held: Collection[int], num_layers: int, bundle: str) -> str:
    names = ", ".join(str(each) for each in sorted(held) if each <= num_layers) or LAST
    return f"hidden state {layer} of {num_layers} layers is read; {bundle}, which is installed, holds {names}."


class TowerOutput(BaseModelOutputWithPooling):
    """`BaseModelOutputWithPooling` whose fields raise where they were neither there nor assigned."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call] # which reads fields that are not there
        vars(self)["_made"] = True

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if value is None and name in ("last_hidden_state", "pooler_output") and "_made" in vars(self):
            raise ConfigError(_why_absent(name))
        return value

    def __repr__(self) -> str:
        there = ", ".join(f"{name}={value!r}" for name, value in self.items())
        return f"{type(self).__name__}({there})"

    def to_tuple(self) -> tuple[Any, ...]:
        """Give (last_hidden_state, pooler_output), and hidden_states if asked for; what is not there raises."""
        names = ("last_hidden_state", "pooler_output", *(["hidden_states"] if "hidden_states" in self else []))
        return Held((vars(self).get(name) for name in names), lambda index: _why_absent(names[index]))


def _why_absent(name: str) -> str:
    if name == "pooler_output":
        return "pooler_output was read, one vector of an image: no bundle holds it, uninstall the bundle."
    return (
        f"{name} was read, and the installed bundle does not hold it: export it with --select-layer last_hidden_state."
    )
