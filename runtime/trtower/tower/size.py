"""The size of a picture as configs of image processors write it, read in every way that model code reads it."""

from collections.abc import Iterator
from typing import Any


class Size(dict[str, int]):
    """A size in pixels, {"shortest_edge": n} or {"height": h, "width": w}, which answers in either form and as (h, w).

    LLaVA and LLaVA-NeXT read `size["shortest_edge"]`, `size["height"]`, `size[0]` and `min(size)`, as the processors of
    their own towers have it. Items, equality and JSON are those of the dict as it was written.
    """

    def __missing__(self, key: Any) -> int:
        if not self:
            raise KeyError(key)
        height, width = self.sides
        answers: dict[Any, int] = {"shortest_edge": min(height, width), "height": height, "width": width}
        answers |= dict(enumerate(self.sides)) | {-1: width, -2: height}
        if key not in answers:
            raise KeyError(key)
        return answers[key]

    def __iter__(self) -> Iterator[Any]:
        """Yield height and width, as the tuple does that SigLIP's processor in LLaVA-NeXT has here."""
        return iter(self.sides)

    def __setitem__(self, key: str, value: int) -> None:
        """Set a side in the form that the size has; height or width give up one that has only its shortest edge."""
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
        """Return a size of the same form for square pictures of this side."""
        return Size(dict.fromkeys(self.keys(), side))
