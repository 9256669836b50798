"""The plan of the house: which folder may import which. docs/architecture.md draws it."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")

ROWS = {
    "trtower": (
        "errors extras lazy names layer_codes reading spec head dtypes flavour timm_names",
        "bundle",
        "fingerprint graph",
        "runners",
        "parity",
        "inspection tower",
        "installation embedding serving",
        "__init__",
        "cli",
        "__main__",
    ),
    "trtower_export": (
        "arguments console drawing options recipes targets families heads policies",
        "checkpoint",
        "graph",
        "precision plan",
        "check bundling",
        "pipeline",
        "bench demo play",
        "commands measuring listings",
        "__init__",
    ),
}
"""The folders of each package, and the modules beside them, in rows: from those that know nothing of the rest to those
that know all. Each imports from its own row and from those above it here, and no two import each other."""

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 400, 60
"""Where a file or a function is split. Both are symptoms of two things that became one."""

COMMANDS = (
    "trtower.embedding.command",
    "trtower.serving.triton.command",
    "trtower_export.commands",
    "trtower_export.measuring",
    "trtower_export.play.command",
)

MODULES = {
    ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
    for source in (ROOT / "runtime", ROOT / "export")
    for path in source.rglob("*.py")
}


def imports(name: str) -> Iterator[str]:
    """Name the modules of ours that a module imports: at its top, in a function, or for types only."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {each if each in MODULES else node.module for each in inner}


ARROWS = {name: set(imports(name)) - {name} for name in MODULES}


def folder(name: str) -> str:
    package, _, rest = name.partition(".")
    return f"{package}.{rest.partition('.')[0] or '__init__'}"


def row_of(name: str) -> tuple[int, int]:
    package, _, own = folder(name).partition(".")
    rows = ROWS[package]
    return [*ROWS].index(package), next(number for number, folders in enumerate(rows) if own in folders.split())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_arrow_points_the_same_way(name: str) -> None:
    assert not [f"{name} imports {other}" for other in ARROWS[name] if row_of(other) > row_of(name)]


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names the circle


def test_no_two_folders_import_each_other() -> None:
    folders: dict[str, set[str]] = {}
    for name, others in ARROWS.items():
        folders.setdefault(folder(name), set()).update({folder(other) for other in others} - {folder(name)})
    TopologicalSorter(folders).prepare()


def test_no_file_and_no_function_outgrows_a_reader() -> None:
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= LINES_OF_A_FILE, path
        for node in ast.walk(ast.parse(text)):
            # A command declares its options in its signature, which is long but easy to read.
            if isinstance(node, ast.FunctionDef) and name not in COMMANDS:
                documented = len((ast.get_docstring(node) or "").splitlines())
                lines = (node.end_lineno or 0) - node.lineno - documented
                assert lines < LINES_OF_A_FUNCTION, f"{name}.{node.name}"


def test_page_shows_every_file_and_no_other() -> None:
    shown: set[str] = set()
    (tree,) = re.findall(r"```text\n((?:runtime|export)/.*?)```", PAGE, flags=re.DOTALL)
    folders: list[str] = []
    for line in filter(None, tree.splitlines()):
        indent, names = re.match(r"( *)(\S+(?:  ?\S+)*?)(?:   +|$)", line).groups()
        folders[len(indent) // 2 :] = [names] if names.endswith("/") else []
        parts = [] if names.endswith("/") else names.split()
        shown |= {"".join(folders) + part for part in parts}
    with_code = [path for path in MODULES.values() if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1]
    files = {str(path.relative_to(ROOT)) for path in with_code}
    assert {name for name in shown if name.endswith(".py")} == files


@pytest.mark.parametrize(("heading", "package"), [("runtime", "trtower"), ("export", "trtower_export")])
def test_page_draws_the_rows_as_they_are(heading: str, package: str) -> None:
    _, _, table = PAGE.partition(f"| {heading} | what it is |\n|---|---|\n")
    rows = [line.split("|")[1] for line in table.partition("\n\n")[0].splitlines()]
    drawn = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    assert drawn == [set(folders.split()) for folders in ROWS[package] if not folders.startswith("__")]
