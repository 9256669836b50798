"""Swap the one function of a client that changes: the one that builds its tower."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trtower


@contextmanager
def swapped(module: Any, build: Callable[..., Any] | None = trtower.build_vision_tower) -> Iterator[None]:
    """Make a module build its tower with ``build`` inside the block; with None, leave the module as it is."""
    before = module.build_vision_tower
    module.build_vision_tower = build or before
    try:
        yield
    finally:
        module.build_vision_tower = before
