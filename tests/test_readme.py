"""The README is short, names every row that people look for, and runs; test_docs.py has what holds for every page."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pages import ROOT, blocks, read, shell_lines
from trtower_export.families import FAMILIES

README = read(ROOT / "README.md")
PRODUCTS = ("T4", "A10", "L4", "RTX 4090", "RTX Blackwell", "A100", "H100", "H200", "B200")
JETSONS = ("Jetson Orin", "Jetson Thor")
OTHERS = ("CPU server", "Mac", "Windows", "LLaVA-like", "robot policy", "embedding service", "vLLM", "SGLang")
REFUSED = ("Qwen-VL-like model",)
MOST_LINES, MOST_WORDS, FIRST_SCREEN = 150, 1000, 40


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    assert len(README.split()) <= MOST_WORDS


def test_first_screen_says_for_whom_it_is() -> None:
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN])
    assert [name for name in (*PRODUCTS, *JETSONS, *OTHERS, *REFUSED) if name not in screen] == []


def test_first_page_of_the_site_promises_no_more() -> None:
    index = read(ROOT / "docs" / "index.md")
    (headline,) = re.findall(r"^\*\*(.+)\*\*$", README, flags=re.MULTILINE)
    (status,) = re.findall(r"^> (\*\*Status: .+) On your GPU, run ", README, flags=re.MULTILINE)
    assert headline in index
    assert status in index


def test_every_family_is_named() -> None:
    assert [family.name for family in FAMILIES if f"`{family.name}`" not in README] == []


def test_newcomer_gets_two_commands() -> None:
    assert re.findall(r"`(make (?:demo|test))`", README.partition("## Quick start")[2]) == ["make demo", "make test"]
    assert shell_lines(README)[0].startswith("python3 -m venv")


def test_python_runs(clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clip_bundle, "engines/clip-vit-large-patch14-336")
    (code,) = blocks("python", README)
    names: dict[str, Any] = {"image": Image.new("RGB", (60, 50))}
    exec(code, names)  # noqa: S102 - the README's own example
    assert names["features"].shape == (1, 9, 64)
