"""An error is one line; a failure exits with 1, wrong usage with 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

import trtower
from trtower import VisionTower
from trtower.bundle.bundle import Bundle
from trtower.cli import run
from trtower.errors import BundleError
from trtower.extras import how_to_install
from trtower.inspection import as_text, inspect_bundle
from trtower.parity.bounds import BOUNDS
from trtower.runners import choose
from trtower_export.console import LoggedProgress
from trtower_export.plan.build import add_plan


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "nowhere"], 1, "nowhere is not a bundle"),
        (["inspect", ""], 2, "bundle is ''; expected the path of a folder."),
        (["check", ""], 2, "'BUNDLE': it is empty; give a value (an option can also be left out)"),
        (["check", "BUNDLE", "--images", ""], 2, "'--images': it is empty"),
        (["check", "BUNDLE", "--checkpoint", ""], 2, "'--checkpoint': it is empty"),
        (["export", "CLIP", "--out", ""], 2, "'--out': it is empty"),
        (["export", "CLIP", "--tower", ""], 2, "'--tower': it is empty"),
        (["demo", "--out", ""], 2, "'--out': it is empty"),
        (["inspect", "a\0b"], 2, "expected the path of a folder, without NUL"),
        (["inspect", "~nobody-of-this-name/x"], 2, "'~nobody-of-this-name/x'; expected the path of a folder"),
        (["inspect"], 2, "Missing argument"),
        (["inspect", "a", "b"], 2, "unexpected extra argument"),
        (["export"], 2, "Missing argument"),
        (["export", "CLIP", "--fp16"], 2, "No such option"),
        (["export", "CLIP", "--ouput", "b"], 2, "--out"),
        (["export", "CLIP", "--layer", "-2"], 2, "--select-layer"),
        (["exprt", "CLIP"], 2, "export"),
        (["bench", "BUNDLE", "--json", "bench.json"], 2, "bench.json"),
        (["bench", "BUNDLE", "--against", "onnx"], 2, "'onnx'; did you mean 'onnxruntime'? choose eager, "),
        (["inspect", "CLIP"], 1, "it has no tower.json. `trtower export "),
        (["inspect", "BUNDLE/tower.onnx"], 1, "it is a file in the bundle "),
        (["build", "BUNDLE", "--flavour", "none"], 2, "unknown flavour 'none'; choose auto, tensorrt or tensorrt-rtx."),
        (["build", "BUNDLE", "--flavour", "rtx"], 2, "unknown flavour 'rtx'; did you mean 'tensorrt-rtx'?"),
        (["check", "BUNDLE", "--backend", "onnx"], 2, "did you mean 'onnxruntime'?"),
        (["no-such-command"], 2, "No such command"),
        (["export", "./nowhere", "--no-check"], 1, "./nowhere is not a folder"),
        (
            ["export", "CLIP", "--precision", "int3"],
            2,
            "unknown precision 'int3'; did you mean 'int8'? choose auto, fp16, bf16, fp32, fp8 or int8.",
        ),
        (["export", "CLIP", "--select-layer", "-30", "--no-check"], 2, "4 layers accept -5 to 4"),
        (["export", "CLIP", "--batch", "4,2,8", "--no-check"], 2, "batch profile 4 2 8 is out of order"),
        (["export", "CLIP", "--batch", "1,1,9999999999", "--no-check"], 2, "is too large; MAX can be at most 65536"),
        (
            ["export", "CLIP", "--batch", "1,1,1", "--batch", "1,1,1", "--no-check"],
            2,
            "1 1 1 was given twice",
        ),
        (["build", "BUNDLE", "--workspace-mib", "99999999999999"], 2, "expected 1 to 16777216"),
        (["build", "BUNDLE", "--strip", "--flavour", "tensorrt-rtx"], 1, "--strip needs a GPU to build a plan without"),
        (["export", "CLIP", "--compute-capability", "9.9", "--no-check"], 2, "compute capability '9.9'; choose 7.5"),
        (["export", "CLIP", "--precision", "bf16", "--compute-capability", "7.5"], 2, "bf16 needs compute capability"),
        (["export", "CLIP", "--select-feature", "cls", "--no-check"], 2, "patch, cls_patch, slicefour_patch"),
        (["export", "CLIP", "--select-layer", "sliceseven", "--no-check"], 2, "'sliceseven' is not a layer code"),
        (["export", "CLIP", "--select-layer=-2,x", "--no-check"], 2, "'x' is not a layer code"),
        (["export", "CLIP", "--image-size", "0", "--no-check"], 2, "smaller than one patch of 14"),
        (["export", "", "--no-check"], 1, "no checkpoint named"),
        (["export", "CLIP", "--image-size", "7", "--no-check"], 2, "smaller than one patch of 14"),
        (["build", "nowhere"], 1, "nowhere is not a bundle"),
        (["check", "BUNDLE", "--images", "nowhere"], 1, "nowhere"),
        (["check", "BUNDLE", "--backend", "tensorrt-rtx"], 1, "tensorrt-rtx: no GPU here"),
    ],
)
def test_error_is_one_line_with_its_exit_code(
    checkpoints: dict[str, Path],
    clip_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    places = {"CLIP": str(checkpoints["clip"]), "BUNDLE": str(clip_bundle)}
    places["BUNDLE/tower.onnx"] = str(clip_bundle / "tower.onnx")
    assert run([places.get(argument, argument) for argument in arguments]) == code
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert all(step.startswith("  ") and step.endswith(" s") for step in progress)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="is not a bundle"):
        run(["--debug", "inspect", "nowhere"])


def test_missing_package_names_its_extra() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None; from trtower.cli import run; sys.exit(run(['export', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    expected = f"error: this command needs the package transformers: {how_to_install('export')}"
    assert done.stderr.splitlines()[-1] == expected


def test_inspect_reports_what_runs_and_why_the_rest_does_not(
    clip_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(clip_bundle)]) == 0
    text = capsys.readouterr().out
    for part in (
        "clip tower",
        "hidden state 3 of 4 layers, patch tokens",
        "(batch, 3, 42, 42) float16",
        "runs onnxruntime-cpu",
        "not  tensorrt ",
        "certificate  none",
    ):
        assert part in text


def test_export_and_inspect_describe_the_cut_in_the_same_words(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--precision", "fp32", "--flavour", "none", "--no-check"]
    assert run(["export", str(checkpoints["clip"]), "--out", str(tmp_path / "b"), *arguments]) == 0
    (cut,) = [line for line in capsys.readouterr().err.splitlines() if "GFLOP" in line]
    assert cut == "  keeps 3 of 4 layers, 0.1 of 0.2 M parameters (1 of 1 MB), 0.0 of 0.0 GFLOP an image"
    assert run(["inspect", str(tmp_path / "b")]) == 0
    assert f"\n  {cut.split()[0]:<12} {' '.join(cut.split()[1:])}\n" in capsys.readouterr().out


def test_inspect_names_last_hidden_state(clip_bundle: Path) -> None:
    found = inspect_bundle(Bundle.open(clip_bundle))
    found = replace(found, spec=replace(found.spec, layers=(3, 5)))
    assert "\n  reads        hidden states 3, last_hidden_state of 4 layers, patch tokens\n" in as_text(found)


def test_inspect_reports_the_same_as_json(clip_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(clip_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spec"]["layers"] == [3]
    assert (found["full"]["layers"], found["cut"]["layers"]) == (4, 3)
    for figure in ("parameters", "flop"):
        assert 0.5 < found["cut"][figure] / found["full"][figure] < 0.9
    assert {row["backend"]: row["runs"] for row in found["backends"]}["onnxruntime-cpu"]
    assert all(row["runs"] or row["obstacle"] for row in found["backends"])


def test_inspect_marks_a_rehearsal(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "b")
    arguments = [
        "export",
        str(checkpoints["clip"]),
        "--random-weights",
        "--out",
        out,
        "--flavour",
        "none",
        "--no-check",
    ]
    assert run(arguments) == 0
    assert "rehearsal" in capsys.readouterr().out
    assert run(["inspect", out]) == 0
    assert "RANDOM WEIGHTS: a rehearsal" in capsys.readouterr().out


def test_check_exits_1_when_a_bound_is_missed(
    spoilt: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["check", str(spoilt)]) == 0
    assert "passed: the ONNX graph was run" in capsys.readouterr().out
    monkeypatch.setitem(BOUNDS, "fp16", replace(BOUNDS["fp16"], token_cosine_min=1.1))
    assert run(["check", str(spoilt), "--json"]) == 1
    certificate = json.loads(capsys.readouterr().out)
    assert not certificate["passed"]
    assert run(["inspect", str(spoilt)]) == 0
    assert "certificate  of openvino FAILED the check" in capsys.readouterr().out


def test_inspect_calls_a_certificate_void_when_its_file_changed(
    spoilt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(spoilt)]) == 0
    manifest = json.loads((spoilt / "tower.json").read_text())
    manifest["certificates"][0]["files"]["tower.onnx"] = "0" * 64
    (spoilt / "tower.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert run(["inspect", str(spoilt)]) == 0
    assert "certificate  of openvino is void: tower.onnx changed after the check" in capsys.readouterr().out


def test_error_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "x", "--precision", "y" * 100_000]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert len(printed) < 5000
    assert printed.startswith("error: unknown precision 'yyy")
    assert printed.endswith(" characters more)")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tower.onnx.data", "plans/PLAN"])
def test_inspect_finds_a_missing_file(spoilt: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    name = name.replace("plans/PLAN", Bundle.open(spoilt).manifest.plans[0].file)
    (spoilt / name).unlink()
    with pytest.raises(BundleError, match=r"is missing; tower\.json lists it"):
        VisionTower.load(spoilt)
    assert run(["inspect", str(spoilt)]) == 1
    printed = capsys.readouterr()
    assert f"DAMAGED      {name} is missing: copy the bundle again" in printed.out
    assert f"not  openvino          {name} is missing" in printed.out
    assert "runs " not in printed.out  # nothing loads it
    assert printed.err == f"error: {spoilt}: {name} is missing: copy the bundle again\n"
    assert run(["inspect", str(spoilt), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == found["altered"] == [name]


def test_inspect_finds_a_file_that_was_cut_short(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = spoilt / "config.json"
    config.write_bytes(config.read_bytes()[:-1])
    (spoilt / "tower.onnx.data").unlink()
    assert run(["inspect", str(spoilt)]) == 1
    printed = capsys.readouterr()
    assert "tower.onnx.data is missing, config.json was altered: copy the bundle again" in printed.err
    assert "runs " not in printed.out


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_inspect_says_that_nothing_loads_an_altered_config(
    spoilt: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (spoilt / name).write_text((spoilt / name).read_text().replace('"', "'"))
    with pytest.raises(BundleError, match=f"{name} was altered"):
        VisionTower.load(spoilt)
    assert run(["inspect", str(spoilt)]) == 1
    printed = capsys.readouterr().out
    assert f"not  openvino          {name} was altered: copy the bundle again" in printed
    assert "runs " not in printed


def test_inspect_finds_an_altered_file(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = spoilt / "tower.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")
    assert run(["inspect", str(spoilt)]) == 1
    printed = capsys.readouterr()
    assert "DAMAGED      tower.onnx was altered" in printed.out
    assert "not  openvino          tower.onnx was altered" in printed.out
    assert "runs onnxruntime-cpu" in printed.out  # it reads the other graph
    assert "and auto picks it" not in printed.out  # auto raises, rather than skip a damaged file
    assert printed.err == f"error: {spoilt}: tower.onnx was altered: copy the bundle again\n"
    assert run(["inspect", str(spoilt), "--json"]) == 1
    assert not any(row["auto"] for row in json.loads(capsys.readouterr().out)["backends"])


def test_command_without_arguments_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_interrupt_is_reported(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    script = """
import os, signal, sys
from trtower_export.precision import program
program.write_onnx = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
from trtower.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    arguments = ["export", str(checkpoints["clip"]), "--out", str(tmp_path / "b"), "--no-check"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == [".b.lock"]


@pytest.mark.parametrize(
    "typed",
    [
        "export CLIP --batch 1 8 32 --no-check",
        "export --batch 1 8 32 CLIP --no-check",
        "export CLIP --no-check --batch=1 8 32",
        "export CLIP --no-check --batch 1, 8, 32",
        "bench BUNDLE --batch 1 8 32",
    ],
)
def test_error_for_numbers_with_spaces_shows_the_right_form(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"error: .*unexpected extra argument.*: separate the numbers after --batch .* as in --batch 1,8,32$", line
    )


@pytest.mark.parametrize(
    "numbers", ["1,2", "1,2,3,4", "1.5", "-1,1,1", "0", "-8", "1,8", "8x", "1-32", "1:8:32", ",", "1 8 32", "1,8,"]
)
def test_invalid_profile_is_one_line(numbers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "CLIP", "--no-check", "--batch", numbers]) == 2
    assert re.match(r"error: (--batch|batch profile) .*1.8.32", capsys.readouterr().err.splitlines()[-1])


def test_why_lists_the_needs_of_every_plan(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_why: list[str] = []
    without: list[str] = []
    for arguments, lines in ((["--why"], with_why), ([], without)):
        assert run(["inspect", str(spoilt), *arguments]) == 0
        lines += capsys.readouterr().out.splitlines()
    added = [line.strip() for line in with_why if line not in without]
    names = ["flavour", "version", "platform", "compute capability", "certificate", "sha256"]
    assert [line[:18].strip() for line in added] == names
    assert added[1].endswith(" met")
    assert added[4].endswith("it has no certificate")


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")
def test_each_need_of_a_plan_has_its_own_verdict(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((spoilt / "tower.json").read_text())
    plan = manifest["plans"][0]
    plan |= {"version": "1.0.0", "platform": "windows-amd64"}
    (spoilt / "tower.json").write_text(json.dumps(manifest))
    content = (spoilt / plan["file"]).read_bytes()
    (spoilt / plan["file"]).write_bytes(content[:-1] + b"!")
    assert run(["inspect", str(spoilt), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    verdicts = found["verdicts"]
    assert verdicts["flavour"] is None
    assert verdicts["version"].startswith("was built by tensorrt-rtx 1.0.0, but ")
    assert verdicts["platform"].startswith("was built for windows-amd64, but this machine is ")
    assert verdicts["compute capability"].startswith("no GPU here")
    assert verdicts["sha256"] == f"{plan['file']} was altered: copy the bundle again"


def test_plan_without_weights_needs_the_graph_too(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((spoilt / "tower.json").read_text())
    manifest["plans"][0]["settings"]["stripped"] = True
    (spoilt / "tower.json").write_text(json.dumps(manifest))
    weights = spoilt / "tower.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert run(["inspect", str(spoilt), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    assert found["verdicts"]["sha256"] == "tower.onnx.data was altered: copy the bundle again"


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_inspect_reports_a_damaged_plan(spoilt: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    (plan,) = Bundle.open(spoilt).manifest.plans
    (spoilt / plan.file).unlink()
    if damage == "cut short":
        (spoilt / plan.file).write_bytes(b"half")
    with pytest.raises(BundleError, match=r"\.plan (has 4 bytes|is missing)"):
        Bundle.open(spoilt)
    assert run(["inspect", str(spoilt), "--why"]) == 1
    text = capsys.readouterr().out
    what = "was altered" if damage == "cut short" else "is missing"
    assert f"sha256             {plan.file} {what}: copy the bundle again" in text
    assert f"DAMAGED      {plan.file} {what}" in text


def test_inspect_names_the_plan_if_there_are_several(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("describes a machine without a GPU")
    add_plan(Bundle.open(spoilt), "tensorrt-rtx", ("8.9",), LoggedProgress())
    assert run(["inspect", str(spoilt)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    not  tensorrt-rtx ")]
    plans = Bundle.open(spoilt).manifest.plans
    assert [plan.file in line for plan, line in zip(plans, lines, strict=True)] == [True, True]


def test_missing_build_log_does_not_prevent_serving(spoilt: Path) -> None:
    (plan,) = Bundle.open(spoilt).manifest.plans
    (spoilt / plan.log).unlink()
    bundle = Bundle.open(spoilt)
    assert bundle.altered() == []
    assert VisionTower.load(spoilt).is_loaded
    copy = bundle.copy_to(spoilt.with_name("copy"))
    assert (copy.path / plan.file).is_file()
    assert copy.altered() == []
    assert run(["inspect", str(spoilt)]) == 0


def test_module_is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "trtower", "--version"], check=True, capture_output=True, text=True)
    assert ran.stdout == f"trtower {trtower.__version__}\n"


def test_version_is_an_option_and_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == run(["version"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"trtower {trtower.__version__}"] * 2


@pytest.mark.parametrize("altered", [False, True])
def test_inspect_marks_what_auto_picks(spoilt: Path, capsys: pytest.CaptureFixture[str], *, altered: bool) -> None:
    if altered:  # a file that auto does not pick
        (plan,) = Bundle.open(spoilt).manifest.plans
        content = (spoilt / plan.file).read_bytes()
        (spoilt / plan.file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run(["inspect", str(spoilt), "--json"]) == int(altered)
    chosen = [row["backend"] for row in json.loads(capsys.readouterr().out)["backends"] if row["auto"]]
    assert run(["inspect", str(spoilt)]) == int(altered)
    marked = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "and auto picks it" in line]
    if not altered:
        runner = VisionTower.load(spoilt).runner
        assert runner
        assert chosen == [runner.backend]
    assert marked == chosen
    assert len(chosen) == 1


def test_auto_picks_what_failed_its_check_if_nothing_else_runs(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(export("clip", precision="fp32", flavour="none"), tmp_path / "b")
    monkeypatch.setattr(choose, "BACKENDS", [each for each in choose.BACKENDS if each.name == "onnxruntime-cpu"])
    monkeypatch.setitem(BOUNDS, "fp32", replace(BOUNDS["fp32"], token_cosine_min=1.1))
    assert run(["check", str(bundle)]) == 1
    found = inspect_bundle(Bundle.open(bundle))
    (row,) = [row for row in found.backends if row.auto]
    assert (row.backend, row.runs) == ("onnxruntime-cpu", True)
    assert re.search(r"and auto picks it, although its check of \S+ missed", as_text(found))


PYDANTIC_1 = "VERSION = '1.10.27'\n"
BREAKS = "raise AttributeError('numpy.dtype size changed')\n"


@pytest.mark.parametrize(
    ("package", "content", "command", "message"),
    [
        (
            "pydantic",
            PYDANTIC_1,
            ["inspect", "nowhere"],
            r"the installed typer \S+ fails to import .*pip install 'typer<0\.29'",
        ),
        (
            "pydantic",
            PYDANTIC_1,
            ["export", "nowhere"],
            r"the installed typer \S+ fails to import .*pip install 'typer<0\.29'",
        ),
        ("rich", BREAKS, ["inspect", "nowhere"], r"the installed rich \S+ fails to import \(AttributeError"),
        ("onnx", BREAKS, ["export", "nowhere"], r"the installed onnx \S+ fails to import \(AttributeError"),
        (
            "rich",
            "import gone",
            ["inspect", "nowhere"],
            r"the installed rich \S+ fails to import .*No module named 'gone'",
        ),
    ],
)
def test_package_that_breaks_at_import_is_one_line(
    tmp_path: Path, package: str, content: str, command: list[str], message: str
) -> None:
    if package == "pydantic" and "pydantic" not in " ".join(metadata.requires("typer") or ()):
        pytest.skip("this typer does not need pydantic")
    (tmp_path / f"{package}.py").write_text(content)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    program = "from trtower.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 1
    assert re.match(f"error: {message}", done.stderr.splitlines()[-1])
    assert "separate environment" in done.stderr
    assert "Traceback" not in done.stderr


def test_serving_does_not_need_the_command(clip_bundle: Path, tmp_path: Path) -> None:
    for package in ("pydantic", "typer", "rich"):
        (tmp_path / f"{package}.py").write_text(BREAKS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    program = "import sys, trtower; print(trtower.VisionTower.load(sys.argv[1]).is_loaded)"
    done = subprocess.run(
        [sys.executable, "-c", program, clip_bundle],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout == "True\n"


def test_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, clip_bundle: Path) -> None:
    def bug(*_: object, **__: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr("trtower.inspection.inspect_bundle", bug)
    with pytest.raises(AttributeError, match="a bug"):
        run(["inspect", str(clip_bundle)])
