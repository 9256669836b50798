"""What the README shows runs; test_docs.py has what holds for every page."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from tests.conftest import Bundles
from tests.pages import ROOT, blocks, read, shell_lines
from tests.runtime.installation.hugging_face import inputs, make
from trtower_export.families import FAMILIES
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.recipes import all_recipes

README = read(ROOT / "README.md")
BUNDLE = "engines/clip-vit-large-patch14-336"


def test_newcomer_gets_two_commands() -> None:
    assert [line for line in shell_lines(README) if line.startswith("make")] == ["make demo", "make test"]


def test_python_runs(clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clip_bundle, BUNDLE)
    load, _, serve, _ = blocks("python", README)
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
    _, install, *_ = blocks("python", README)
    names: dict[str, Any] = {"model": model, "inputs": asked}
    exec(install, names)  # noqa: S102 - the README's own example
    assert names["answer"].equal(model.generate(**asked))
    assert "freed 0.7 MB" in capsys.readouterr().out
    assert model.model.vision_tower is eager


def test_layers_are_picked_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4, image_size=42, patch_size=14
    )
    transformers.CLIPVisionModel(config).save_pretrained("deep")
    options = ExportOptions(select_layer=(-2, -5, -8, -11, 6), flavour="none", check=False)
    export_tower("deep", Path("engines/vip-llava-7b-hf"), options)
    *_, code = blocks("python", README)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - the README's own example
    assert names["tower"].hidden_size == 2 * 64


def test_recipe_for_every_tower_that_is_listed() -> None:
    section = README.partition("### Recipes")[2].partition("\n## ")[0]
    listed = {name for line in section.splitlines() if line.startswith("- ") for name in re.findall(r"`(\S+)`", line)}
    assert listed == {recipe.name for recipe in all_recipes()}


def test_family_for_every_row_that_is_listed() -> None:
    section = README.partition("## What goes in")[2].partition("###")[0]
    for family in FAMILIES:
        assert f"`{family.name}`" in section
        assert f"`{family.model_class}`" in section
