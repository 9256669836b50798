"""The commands accept what people type first, and print what a script can read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import trtower
from trtower import Bundle, VisionTower
from trtower.cli import run
from trtower.spec import BatchProfile
from trtower_export.arguments import read_profile
from trtower_export.listings import recipes
from trtower_export.recipes import all_recipes

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def exported(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    def export(*options: str) -> Path:
        out = tmp_path / 'a "bundle"'
        common = ["--out", str(out), "--flavour", "none", "--overwrite"]
        assert run(["export", str(checkpoints["clip"]), *common, *options]) == 0
        return out

    return export


@pytest.mark.parametrize(
    ("typed", "profiles"),
    [
        (["--batch", "3"], [(1, 3, 3)]),
        (["--batch=1,2,3"], [(1, 2, 3)]),
        (["--batch", "1,1,1", "--batch", "1,2,3"], [(1, 1, 1), (1, 2, 3)]),
    ],
)
def test_profile_is_accepted_as_people_write_it(
    exported: Callable[..., Path], typed: list[str], profiles: list[tuple[int, int, int]]
) -> None:
    manifest = Bundle.open(exported("--no-check", *typed)).manifest
    assert [(each.min, each.opt, each.max) for each in manifest.profiles] == profiles


def test_one_number_is_both_the_maximum_and_the_optimum() -> None:
    assert read_profile("8") == BatchProfile(min=1, opt=8, max=8)
    assert read_profile("1") == BatchProfile(min=1, opt=1, max=1)


def test_export_ends_with_lines_that_load_the_bundle(
    exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported()
    lines = capsys.readouterr().out.splitlines()
    assert str(bundle) in lines  # for a script
    load, install = (line.strip() for line in lines if re.search(r"VisionTower\.load|trtower\.install", line))
    assert lines[-1].strip() == install
    names: dict[str, Any] = {"VisionTower": VisionTower}
    exec(load, names)  # noqa: S102 - the line that the command printed
    assert names["tower"].is_loaded
    assert install == f"trtower.install(model, {json.dumps(str(bundle))})"
    assert hasattr(trtower, "install")


@pytest.mark.parametrize("precision", ["half", "float16", "FP16", "torch.float16"])
def test_unknown_precision_names_the_nearest(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "nowhere", "--precision", precision]) == 2
    expected = (
        f"error: unknown precision {precision!r}; did you mean 'fp16'? choose auto, fp16, bf16, fp32, fp8 or int8."
    )
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_stdout_holds_only_the_json(
    checkpoints: dict[str, Path], spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(spoilt)
    for command in (
        ["inspect", bundle],
        ["check", bundle],
        ["check", bundle, "--report", str(tmp_path / "report")],
        ["doctor", str(checkpoints["clip"]), "--error-images", "0"],
        ["bench", bundle, "--against", "", "--rounds", "1", "--tiles", "0"],
    ):
        assert run([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_check_ends_with_the_page_of_its_report(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(spoilt), "--report", str(tmp_path / "report")]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert run(["check", str(spoilt), "--report", str(tmp_path / "report"), "--json"]) == 0
    assert str(page) in capsys.readouterr().err
    assert page.parent == tmp_path / "report"
    assert page.read_text(encoding="utf-8").startswith("<!")


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes() == 0
    table = capsys.readouterr().out
    assert recipes(json_=True) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [recipe.name for recipe in all_recipes()]
    for row in rows:
        line = next(line for line in table.splitlines() if line.startswith(f"{row['name']} "))
        assert line.split()[:4] == [row["name"], row["checkpoint"], row["family"], str(row["image_size"])]
    openvla = next(row for row in rows if row["name"] == "openvla-7b")
    assert (openvla["family"], openvla["image_size"], openvla["select_layer"]) == ("prismatic", 224, -2)


def test_recipes_are_a_command() -> None:
    assert 'recipes = "trtower_export.listings:recipes"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    app = typer.Typer()
    app.command("recipes")(recipes)
    command = typer.main.get_command(app)
    assert [parameter.opts for parameter in command.params if parameter.name == "json_"] == [["--json"]]
