"""Dicts that model code reads in other ways too: any key as an attribute, a picture's size in every form."""

from collections.abc import Iterator
from typing import Any

import torch


class AttributeDict(dict[str, Any]):
    """A dict whose keys can be read, set and deleted as attributes. JSON and pickle treat it as any dict."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this {type(self).__name__} has no {name!r}; it holds {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"this {type(self).__name__} has no {name!r} to delete") from None


class Size(dict[str, int]):
    """A size in pixels, {"shortest_edge": n} or {"height": h, "width": w}, that reads in either form and as (h, w).

    LLaVA and LLaVA-NeXT read `size["shortest_edge"]`, `size["height"]`, `size[0]` and `min(size)`, depending on the
    tower's processor. Items, equality and JSON stay those of the dict as written.
    """

    def __missing__(self, key: Any) -> int:
        if not self:
            raise KeyError(key)
        height, width = self.sides
        answers: dict[Any, int] = {"shortest_edge": min(height, width), "height": height, "width": width}
        answers |= {0: height, 1: width, -2: height, -1: width}
        return answers[key]

    def __iter__(self) -> Iterator[Any]:
        """Yield height and width, like the tuple that SigLIP's processor in LLaVA-NeXT has as its size."""
        return iter(self.sides)

    def __setitem__(self, key: str, value: int) -> None:
        """Set a side. If the size has height and width, "shortest_edge" sets both.

        If it has a shortest edge, setting height or width first turns that into both sides.
        """
        if key == "shortest_edge" and "height" in self.keys():
            super().update(height=value, width=value)
            return
        if key in ("height", "width") and (edge := self.pop("shortest_edge", None)) is not None:
            super().update(height=edge, width=edge)
        super().__setitem__(key, value)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        edge = self.get("shortest_edge")
        return (self["height"], self["width"]) if edge is None else (edge, edge)

    def resized(self, side: int) -> "Size":
        """Return a size of the same form for square pictures with this side."""
        return Size(dict.fromkeys(self.keys(), side))


class BatchFeature(AttributeDict):
    """A dict whose keys are also attributes, like transformers' class of this name."""

    def to(self, *args: Any, **kwargs: Any) -> "BatchFeature":
        """Move and cast the tensors in place. Only floating-point tensors are cast.

        Args:
            *args: As for ``Tensor.to``.
            **kwargs: As for ``Tensor.to``.

        Returns:
            This dict.
        """
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                moved = value.to(*args, **kwargs)
                self[name] = moved if value.is_floating_point() else value.to(moved.device)
        return self
