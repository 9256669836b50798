"""The options for opening and running a tower, written once for every tower class.

Type checkers read `TowerKeywords`; the code reads `TowerOptions`. To add an option, add a line to each; `takes_options`
puts it into the signatures.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

import torch

from trtower.errors import ConfigError
from trtower.runners.base import EngineOptions

F = TypeVar("F", bound=Callable[..., Any])


class OtherKeywords(TypedDict, total=False):
    """The options that `VisionTower.load` accepts by name only."""

    check_finite: bool | None
    count_cls: bool
    require_certificate: bool
    verify: bool
    engine: EngineOptions | None


class TowerKeywords(OtherKeywords, total=False):
    """All options."""

    backend: str
    device: str | torch.device | None


@dataclass(frozen=True, kw_only=True)
class TowerOptions:
    """How to open and run a tower; `VisionTower.load` documents each option."""

    backend: str = "auto"
    device: str | torch.device | None = None
    check_finite: bool | None = None
    count_cls: bool = False
    require_certificate: bool = False
    verify: bool = False
    engine: EngineOptions | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.engine, EngineOptions | None):
            raise ConfigError(f"engine is {self.engine!r}; expected trtower.EngineOptions(…).")


def takes_options(function: F) -> F:
    """Show the ``**options`` of a function in its signature, each by name and with its default."""
    signature = inspect.signature(function)
    own = {name: each for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD}
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(TowerOptions)
        if each.name not in own
    ]
    shown: Any = function
    shown.__signature__ = signature.replace(parameters=[*own.values(), *options])
    return function
