"""What a vision model of transformers returns, where a bundle holds some of its states: those, and an error for others.

Whatever is not there raises when it is read and is never None, which model code would carry on with.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trtower.errors import ConfigError
from trtower.layer_codes import LAST


class AbsentError(ConfigError, AttributeError):
    """A state that is not there was used; an AttributeError, too, for accelerate, which asks what it may move."""


class Absent:
    """Takes a tensor's place and raises when it is used; it may be handed on, as accelerate hands on what it finds."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise AbsentError(vars(self).get("_why", f"{name} is not there."))

    def __getitem__(self, index: Any) -> Any:
        raise ConfigError(self._why)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise in whichever function of torch it was given to."""
        found = next(iter(_absent_among((args, kwargs))), None)
        raise ConfigError(found._why if found else f"{func} was given what is not there.")


def _absent_among(value: Any) -> Iterator[Absent]:
    if isinstance(value, Absent):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _absent_among(item)


class Held(tuple[Any, ...]):
    """A tuple that raises when an absent item is taken out of it."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        item = super().__getitem__(index)
        if isinstance(item, Absent):
            raise ConfigError(item._why)
        return item


def hold_states(states: Mapping[int, Tensor], num_layers: int, bundle: str) -> Held:
    """Make `hidden_states` of L + 1 entries of those that there are; ``bundle`` is the path of what gives them."""
    return Held(
        states[index] if index in states else Absent(_why_no_state(index, states, num_layers, bundle))
        for index in range(num_layers + 1)
    )


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

    def __reduce__(self) -> Any:
        return type(self), (dict(self.items()),)

    def to_tuple(self) -> tuple[Any, ...]:
        """Give (last_hidden_state, pooler_output), and hidden_states if asked for; what is not there raises."""
        names = ("last_hidden_state", "pooler_output", *(["hidden_states"] if "hidden_states" in self else []))
        there = vars(self)
        return Held(Absent(_why_absent(name)) if there[name] is None else there[name] for name in names)


def _why_absent(name: str) -> str:
    if name == "pooler_output":
        return "pooler_output was read, one vector of an image: no bundle holds it, uninstall the bundle."
    return (
        f"{name} was read, and the installed bundle does not hold it: export it with --select-layer last_hidden_state."
    )
