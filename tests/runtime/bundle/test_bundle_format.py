"""The page on the bundle format lists exactly the keys of tower.json, with their types and defaults."""

import dataclasses
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from trtower.bundle.manifest import CONFIG, GRAPH, GRAPH_DATA, MANIFEST, PLANS, PREPROCESSOR, SCHEMA, Manifest

PAGE = (Path(__file__).parents[3] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


def type_of(hint: Any) -> str:
    """Return a type as the page writes it, in JSON's terms."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        return f"list of {type_of(args[0])}"
    if origin is dict:
        return f"object of {type_of(args[1])}"
    if origin is types.UnionType:
        return " or ".join(map(type_of, args))
    return TYPES.get(hint, hint.__name__)


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a default as the page writes it; `{}` for a dataclass with its own defaults."""
    if field.default_factory is not dataclasses.MISSING:
        return "`{}`"
    if field.default is dataclasses.MISSING:
        return "required"
    return "`{}`" if dataclasses.is_dataclass(field.default) else f"`{json.dumps(field.default)}`"


def kinds_in(hint: Any) -> Iterator[Any]:
    """Yield the dataclasses in a type, outermost first."""
    if dataclasses.is_dataclass(hint):
        yield hint
        for inner in get_type_hints(hint).values():
            yield from kinds_in(inner)
    for argument in get_args(hint):
        yield from kinds_in(argument)


KINDS = {kind.__name__: kind for kind in kinds_in(Manifest)}
SECTIONS = {section.partition("\n")[0]: section for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]}


def test_page_describes_exactly_the_objects_of_the_manifest() -> None:
    assert SECTIONS.keys() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_page_and_code_agree_on_keys_types_and_defaults(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.+) \|$", SECTIONS[name], flags=re.MULTILINE)
    written = {key: (re.sub(r"\[(\w+)\]\(#\w+\)", r"\1", kind), default) for key, kind, default, _ in rows}
    hints = get_type_hints(KINDS[name])
    assert written == {
        field.name: (type_of(hints[field.name]), default_of(field)) for field in dataclasses.fields(KINDS[name])
    }
    assert len(rows) == len(written) == SECTIONS[name].count("\n| `")


def test_page_names_every_file_and_the_schema() -> None:
    for name in (MANIFEST, GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR, f"{PLANS}/*.plan", f"{PLANS}/*.log"):
        assert f"| `{name}` |" in PAGE
    assert f"schema {SCHEMA}" in PAGE


def test_example_is_a_manifest() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    manifest = Manifest.from_json(example)
    assert manifest.files.keys() >= {GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR, *(plan.file for plan in manifest.plans)}


@pytest.mark.parametrize("link", re.findall(r"\]\(#(\w+)\)", PAGE))
def test_link_leads_to_a_section(link: str) -> None:
    assert link in {name.lower() for name in SECTIONS}
