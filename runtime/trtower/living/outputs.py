"""The states that a bundle holds, in the place of all of them, and in the place of the others something that raises.

Whatever is not there raises when it is used; it is never None, which model code would carry on with, and never
something else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from trtower.errors import ConfigError
from trtower.layer_codes import LAST


class AbsentError(ConfigError, AttributeError):
    """What is not there was used; an AttributeError, too, for accelerate, which asks of everything whether it moves."""


class Absent:
    """Takes a tensor's place and raises when it is used; it may be handed on, as models and accelerate do it."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise AbsentError(vars(self).get("_why", f"{name} is not there."))

    def __repr__(self) -> str:
        return f"<absent: {self._why}>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise in whichever function of torch it was given to."""
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
    """A sequence that raises when an absent item is taken out of it, and hands all of them on when it is iterated.

    It is no tuple, since torch.compile takes every item out of a tuple to guard it.
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


def hold_states(states: Mapping[int, Tensor], num_layers: int, bundle: str) -> Held:
    """Make `hidden_states` of L + 1 entries of those that there are; ``bundle`` is the path of what gives them."""
    held = ", ".join(str(each) for each in sorted(states) if each <= num_layers) or LAST
    return Held(
        states[index]
        if index in states
        else Absent(f"hidden state {index} of {num_layers} layers is read; {bundle}, which is installed, holds {held}.")
        for index in range(num_layers + 1)
    )


def last_hidden_state(states: Mapping[int, Tensor], num_layers: int, bundle: str) -> Any:
    """Give `last_hidden_state`, should there be one."""
    why = f"{LAST} is read; {bundle}, which is installed, does not hold it: export it with --select-layer {LAST}."
    return states.get(num_layers + 1, Absent(why))


def pooler_output() -> Absent:
    """Give what there is of `pooler_output`; models assign their features to it."""
    why = "pooler_output is read, one vector of an image, which no bundle holds: trtower.uninstall(model) has it."
    return Absent(why)
