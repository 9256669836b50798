"""What a real module of TensorRT accepts, as pybind11's docstrings say, and what of a fake differs from it."""

import dis
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def overloads(function: Any) -> list[inspect.Signature]:
    """Read the overloads of a function made by pybind11, each without ``self``; [] if its docstring has none."""
    pattern = rf"^(?:\d+\. )?{function.__name__}\((.*)\) -> "
    return [_read_parameters(each) for each in re.findall(pattern, function.__doc__ or "", flags=re.MULTILINE)]


def _read_parameters(text: str) -> inspect.Signature:
    """Turn "self: Runtime, name: str, size: int = 0" into a signature."""
    _, *parts = re.split(r"(?:^|, )(\w+): ", text)
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=0 if " = " in declared else inspect.Parameter.empty,
            )
            for name, declared in zip(parts[::2], parts[1::2], strict=True)
            if name != "self"
        ]
    )


def accepts(function: Any, *arguments: object, **named: object) -> bool:
    """Return whether some overload takes as many arguments by position, and these by name."""
    for signature in overloads(function):
        try:
            signature.bind(*arguments, **named)
        except TypeError:
            continue
        return True
    return False


def parameter_names(function: Any) -> set[tuple[str, ...]]:
    """List which parameters each overload of a function requires, and which it accepts."""
    listed = [signature.parameters.values() for signature in overloads(function)]
    required = {tuple(each.name for each in some if each.default is each.empty) for some in listed}
    return required | {tuple(each.name for each in some) for some in listed}


def differences(fake: ModuleType | type, real: Any) -> Iterator[str]:
    """Say what a fake module or class has that the real one lacks, and what it declares otherwise."""
    for name, ours in vars(fake).items():
        theirs = getattr(real, name, None)
        if inspect.isfunction(ours):
            stored = {each.argval for each in dis.get_instructions(ours) if each.opname == "STORE_ATTR"}
            yield from (each for each in stored if not each.startswith("_") and not hasattr(real, each))
        if name.startswith("_") and (name != "__init__" or not overloads(theirs)):
            continue  # of the tests; or a constructor that only the fake needs
        if theirs is None:
            yield name
        elif isinstance(ours, type):
            yield from (f"{name}.{key} = {value}" for key, value in _members(ours) ^ _members(theirs))
            yield from (f"{name}.{each}" for each in differences(ours, theirs))
        elif inspect.isfunction(ours):
            given = tuple(inspect.signature(ours).parameters)[1:]
            if given not in parameter_names(theirs):
                yield f"{name}{given}"


def _members(kind: Any) -> set[tuple[str, int]]:
    """Return the members of an enum; nothing for another class."""
    return {(name, int(value)) for name, value in getattr(kind, "__members__", {}).items()}
