"""What the README says can be typed, can be typed."""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from PIL import Image

import trtower
from tests.conftest import Bundles
from tests.runtime.installation.hugging_face import inputs, make
from trtower import cli
from trtower_export.families import FAMILIES
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.recipes import all_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BUNDLE = "engines/clip-vit-large-patch14-336"


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]


def test_newcomer_gets_two_commands() -> None:
    assert [command for command in COMMANDS if command.startswith("make")] == ["make demo", "make test"]


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("line", [command for command in COMMANDS if command.startswith("trtower")])
def test_command_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line.partition(" >")[0])[1:]
    command = typer.main.get_command(cli._app()).commands[name]
    assert command.make_context(name, arguments)


def test_python_runs(clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clip_bundle, BUNDLE)
    load, _, serve, _ = blocks("python")
    names = {"image": Image.new("RGB", (60, 50))}
    exec(load, names)  # noqa: S102 - the README's own example
    features = names.pop("features")
    assert features.shape == (1, 9, 64)
    exec(serve, names)  # noqa: S102 - the README's own example
    assert names["features"].equal(features)


def test_one_line_into_a_living_model_runs(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundles(), "engines/llava-1.5-7b-hf")
    model = make("llava")
    asked = inputs(model, "llava", "one image")
    eager = model.model.vision_tower
    _, install, *_ = blocks("python")
    names: dict[str, Any] = {"model": model, "inputs": asked}
    exec(install, names)  # noqa: S102 - the README's own example
    assert names["answer"].equal(model.generate(**asked))
    assert "freed 0.7 MB" in capsys.readouterr().out
    assert model.model.vision_tower is eager


def test_page_convinces(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundles(), "engines/llava-1.5-7b-hf")
    model = make("llava")
    convince, _ = blocks("python", (ROOT / "docs" / "hugging_face.md").read_text())
    names: dict[str, Any] = {"torch": torch, "trtower": trtower, "model": model}
    names["inputs"] = inputs(model, "llava", "one image")
    exec(convince, names)  # noqa: S102 - the page's own example
    assert names["error"] < 1e-4
    assert names["agreement"] == 1


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_page_names_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#h][^)]*|hugging_face\.md)\)", page.read_text())
    assert links
    assert all((page.parent / link).exists() for link in links)


def test_layers_are_picked_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4, image_size=42, patch_size=14
    )
    transformers.CLIPVisionModel(config).save_pretrained("deep")
    options = ExportOptions(select_layer=(-2, -5, -8, -11, 6), flavour="none", check=False)
    export_tower("deep", Path("engines/vip-llava-7b-hf"), options)
    *_, code = blocks("python")
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - the README's own example
    assert names["tower"].hidden_size == 2 * 64


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#h][^)]*)\)|`((?:export|runtime)/[\w/.]+)`", README))
def test_file_that_is_named_exists(path: tuple[str, str]) -> None:
    assert (ROOT / (path[0] or path[1])).exists()


def test_recipe_for_every_tower_that_is_listed() -> None:
    section = README.partition("### Recipes")[2].partition("\n## ")[0]
    listed = {name for line in section.splitlines() if line.startswith("- ") for name in re.findall(r"`(\S+)`", line)}
    assert listed == {recipe.name for recipe in all_recipes()}


def test_family_for_every_row_that_is_listed() -> None:
    section = README.partition("## What goes in")[2].partition("###")[0]
    for family in FAMILIES:
        assert f"`{family.name}`" in section
        assert f"`{family.model_class}`" in section


def test_no_word_of_the_machine_it_was_written_on() -> None:
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"):
        assert os.fspath(Path.home()) not in path.read_text()
