"""What leads an outsider to the first plan on a GPU is typed rightly, and says that it was not run by us."""

import ast
import json
import re
import shlex

import pytest

from tests.pages import ROOT, read
from tests.test_docs import find_command

NOTEBOOK = json.loads(read(ROOT / "examples" / "first_plan_on_a_t4.ipynb"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
DOCKERFILE = read(ROOT / "docker" / "Dockerfile")


def commands(text: str) -> list[str]:
    return re.findall(r"^!trtower (.*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("line", [line for cell in CELLS for line in commands(cell)])
def test_command_of_the_notebook_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)
    assert find_command(name).make_context(name, arguments)


@pytest.mark.parametrize("cell", CELLS)
def test_cell_compiles(cell: str) -> None:
    assert ast.parse(re.sub(r"^[!%].*$", "", cell, flags=re.MULTILINE)) is not None


def test_notebook_goes_from_export_to_the_plan() -> None:
    assert [line.split()[0] for cell in CELLS for line in commands(cell)] == ["export", "inspect", "check", "bench"]
    assert "--compute-capability 7.5" in "".join(CELLS)
    assert all(cell["id"] for cell in NOTEBOOK["cells"])


def test_container_copies_what_is_there() -> None:
    sources = [
        word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()[:-1]
    ]
    assert sources
    assert all((ROOT / source).exists() for source in sources)


def test_both_say_that_they_were_not_run() -> None:
    assert "NOT RUN BY US" in DOCKERFILE
    assert "We have not run this notebook" in NOTEBOOK["cells"][0]["source"][-1]
