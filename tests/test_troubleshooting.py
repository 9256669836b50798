"""Every message that docs/troubleshooting.md quotes is in the code, in the same words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")

GAP = "…"
"""Stands for a value, on the page and in what `text_of` returns."""

FORMATS = re.compile(r"%(?:\.\d+)?[a-z]|\{\}")
"""What `logging` and `str.format` fill in."""


def text_of(node: ast.AST) -> str:
    """Return the text of a string in the code, with a gap for every value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return FORMATS.sub(GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return GAP


def strings_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            yield text_of(node)


STRINGS = {
    text for source in ("runtime", "export") for path in (ROOT / source).rglob("*.py") for text in strings_of(path)
}

HEADINGS = re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE)
CELLS = re.findall(r"^\| `([^`|]+)` \|", PAGE, flags=re.MULTILINE)


def is_written(message: str) -> bool:
    """Whether one string of the code has the parts of a message, in this order."""
    parts = [part for part in (part.strip() for part in message.split(GAP)) if re.search(r"\w", part)]
    pattern = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
    return any(pattern.search(text) for text in STRINGS)


@pytest.mark.parametrize("message", HEADINGS + CELLS)
def test_message_is_in_the_code(message: str) -> None:
    assert is_written(message)


def test_page_quotes_messages() -> None:
    assert len(HEADINGS) > 10
    assert len(CELLS) > 30


def test_reworded_message_would_be_noticed() -> None:
    assert not is_written("… was altered: its sha1 is …")
