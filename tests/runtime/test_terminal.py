"""The command in a shell: any locale, width and home, a pipe, a file, and completion."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer

import trtower
from trtower.cli import _app, run
from trtower.flavour import FLAVOURS
from trtower.runners.choose import backend_names
from trtower.spec import PRECISIONS
from trtower_export.recipes import all_recipes

TRTOWER = [sys.executable, "-m", "trtower"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
BUILT_IN = ["inspect", "tune", "verify", "version"]
COMMANDS = [*BUILT_IN, *sorted(point.name for point in entry_points(group="trtower.commands"))]
ESCAPE = b"\x1b"


def start(*arguments: str | Path, **environment: str | None) -> subprocess.CompletedProcess[bytes]:
    """Run the command with these variables in its environment, or without those that are None."""
    merged = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [*TRTOWER, *arguments],
        check=False,
        capture_output=True,
        env={name: value for name, value in merged.items() if value is not None},
    )


def test_ascii_terminal_gets_ascii(clip_bundle: Path) -> None:
    done = start("inspect", clip_bundle, **ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.search(r"sha256 [0-9a-f]{12}\.\.\.\)", done.stdout.decode("ascii"))


def test_error_and_log_are_ascii_too(tmp_path: Path) -> None:
    program = """
import logging, sys
from trtower import cli, errors, inspection
def fail(*_, **__):
    logging.getLogger("x").warning("2 ± 1 ≤ 3 … é")
    raise errors.BundleError("“a” → ‖b‖")
inspection.inspect_bundle = fail
import trtower.bundle.bundle as bundle
bundle.Bundle.open = fail
cli.main()
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", "inspect", "b"],
        check=False,
        capture_output=True,
        env=os.environ | ASCII,
    )
    assert done.returncode == 1
    assert done.stderr.decode("ascii").splitlines() == ["x: 2 +- 1 <= 3 ... \\xe9", 'error: "a" -> ||b||']


def test_tables_and_bars_of_rich_are_ascii_on_an_ascii_terminal(tmp_path: Path) -> None:
    pytest.importorskip("pty")
    program = """
from rich.console import Console
from rich.table import Table
from trtower import cli
from trtower_export.console import ConsoleProgress
def show(_):
    with ConsoleProgress(Console()).step("Think") as step:
        step.update(0.5, "a … b")
    table = Table("a")
    table.add_row("b")
    Console().print(table)
    return 0
cli.run = show
cli.main()
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    (tmp_path / "terminal.py").write_text("import pty, sys; pty.spawn(sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, tmp_path / "terminal.py", sys.executable, tmp_path / "program.py"],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | ASCII | {"TERM": "xterm"},
    )
    shown = done.stdout.decode("ascii")
    assert "Think" in shown
    assert "a ... b" in shown
    assert "+---+" in shown
    assert "\\u" not in shown


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C"}, pytest.param(ASCII, marks=pytest.mark.slow)], ids=["C", "ascii"]
)
def test_folder_may_have_spaces_and_umlauts(
    clip_bundle: Path, checkpoints: dict[str, Path], tmp_path: Path, environment: dict[str, str]
) -> None:
    folder = tmp_path / "mein schöner Ördner"
    bundle = shutil.copytree(clip_bundle, folder / "bündel")
    done = start("inspect", bundle, **environment)
    assert done.returncode == 0
    assert "bündel".encode() in done.stdout  # byte for byte, to be copied and piped
    checkpoint = shutil.copytree(checkpoints["clip"], folder / "gewichte")
    out = folder / "neu"
    done = start("export", checkpoint, "--out", out, "--flavour", "none", "--no-check", **environment)
    if environment == ASCII:  # a path that cannot be decoded cannot be written into a manifest
        assert done.returncode == 1
        assert b"Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(b"error: ")
        assert b"PYTHONUTF8=1" in done.stderr.splitlines()[-1]
        assert b"Load weights" not in done.stderr  # refused before any work
    else:
        assert done.returncode == 0
        assert str(out).encode() in done.stdout.splitlines()


@pytest.fixture
def no_home(tmp_path: Path) -> str:
    """A home that nobody can make, root included: it lies below a file."""
    (tmp_path / "file").touch()
    return str(tmp_path / "file" / "home")


@pytest.mark.parametrize("unset", [True, False])
def test_home_may_be_missing_or_read_only(clip_bundle: Path, no_home: str, *, unset: bool) -> None:
    done = start("inspect", clip_bundle, HOME=None if unset else no_home, XDG_CACHE_HOME=None)
    assert (done.returncode, done.stderr) == (0, b"")


def test_plan_is_built_if_the_store_cannot_be_written(
    spoilt: Path, no_home: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert run(["build", str(spoilt), "--flavour", "tensorrt-rtx", "--compute-capability", "8.9"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("  plans are not kept for reuse: ")]) == 1


def test_matplotlib_is_quiet_about_a_cache_that_it_cannot_write(tmp_path: Path, no_home: str) -> None:
    program = """
from trtower import cli, errors, inspection
import trtower.bundle.bundle as bundle
def fail(*_, **__):
    import matplotlib.pyplot
    raise errors.BundleError("drawn")
bundle.Bundle.open = fail
cli.main()
"""
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "-c", program, "inspect", "b"],
        check=False,
        capture_output=True,
        env=os.environ | {"HOME": no_home, "MPLBACKEND": "agg"},
    )
    assert done.stderr == b"error: drawn\n"


@pytest.mark.parametrize("columns", ["60", "200"])
def test_steps_fit_the_width(columns: str) -> None:
    program = """
from rich.console import Console
from trtower_export.console import ConsoleProgress
with ConsoleProgress(Console()).step("Compare"):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, env=os.environ | {"COLUMNS": columns}
    )
    (line,) = done.stdout.decode().splitlines()
    assert len(line) <= int(columns)
    assert re.fullmatch(r"  Compare +0\.0 s", line)


def test_output_into_a_file_has_no_escape_codes_and_no_bars(spoilt: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([*TRTOWER, "check", spoilt], check=True, stdout=out, stderr=out, env=os.environ)
    text = (tmp_path / "out").read_bytes()
    assert b"passed: " in text
    assert ESCAPE not in text
    assert b"\r" not in text
    assert "━".encode() not in text


@pytest.mark.parametrize("merged", [False, True])
def test_reader_of_the_output_may_leave(clip_bundle: Path, tmp_path: Path, *, merged: bool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with (tmp_path / "errors").open("wb") as errors, os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [*TRTOWER, "inspect", clip_bundle], check=False, stdout=pipe, stderr=pipe if merged else errors
        )
    assert done.returncode == 1
    assert (tmp_path / "errors").read_bytes() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "BUNDLE"]])
def test_full_disk_is_one_line(clip_bundle: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*TRTOWER, *(str(clip_bundle) if each == "BUNDLE" else each for each in arguments)],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert done.stderr == b"error: cannot write the output: No space left on device\n"


def test_output_may_be_closed(clip_bundle: Path) -> None:
    command = [shutil.which("sh") or "sh", "-c", 'exec "$@" >&-', "sh", *TRTOWER, "inspect", str(clip_bundle)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_version_is_one_line() -> None:
    assert start("--version").stdout.decode() == f"trtower {trtower.__version__}\n"


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_and_nothing_is_cut(command: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    group = typer.main.get_command(_app())
    chosen = group.commands[command] if command else group  # type: ignore[attr-defined]
    with chosen.make_context("trtower", [], resilient_parsing=True) as context:
        text = chosen.get_help(context)
    assert max(map(len, text.splitlines())) <= columns
    assert text.isascii()
    assert "..." not in re.sub(r"[\]}]\.\.\.", "", text)  # after an argument it means several
    solid = "".join(text.split())  # a word with a hyphen may be folded, too
    for each in chosen.params:
        assert "".join((getattr(each, "help", None) or "").split()) in solid
    for name, each in getattr(chosen, "commands", {}).items():
        summary = each.help.splitlines()[0].rstrip(".")
        assert re.search(rf"^  {name} +{re.escape(summary)}\.?$", text, flags=re.MULTILINE)
    if not command:
        return
    for line in text.partition("Options:")[2].splitlines():
        assert "<" not in line[:30]  # every value has a name of its own, not that of its type


def complete(line: str) -> list[str]:
    words = line.split(" ")
    variables = {"_TRTOWER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return start(**variables).stdout.decode().split()


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("trtower ", COMMANDS),
        ("trtower inspect --w", ["--why"]),
        ("trtower export --sel", ["--select-layer", "--select-feature"]),
        ("trtower export --precision ", ["auto", *PRECISIONS]),
        ("trtower export --flavour n", ["none"]),
        ("trtower build --flavour ", ["auto", *FLAVOURS]),
        ("trtower verify --backend o", [name for name in backend_names() if name.startswith("o")]),
        ("trtower check --backend o", [name for name in backend_names() if name.startswith("o")]),
        ("trtower check --backend em", ["emulated-fp16", "emulated-bf16"]),
        ("trtower bench --against eager,onnx", ["eager,onnxruntime"]),
        ("trtower doctor VILA", [each.name for each in all_recipes() if each.name.startswith("VILA")]),
    ],
)
def test_shell_completes(line: str, choices: list[str]) -> None:
    assert sorted(complete(line)) == sorted(choices)


def test_candidate_of_fish_is_one_line() -> None:
    variables = {"_TRTOWER_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    lines = start(**variables, _TYPER_COMPLETE_ARGS="trtower export --").stdout.decode().splitlines()
    assert len(lines) > len(COMMANDS)
    assert [line for line in lines if not line.startswith("--")] == []


def test_completion_script_is_shown_and_installed(tmp_path: Path) -> None:
    if not (bash := shutil.which("bash")):
        pytest.skip("bash is not installed")
    environment = os.environ | {"HOME": str(tmp_path)}
    for option in ("--show-completion", "--install-completion"):
        script = f'"{sys.executable}" -m trtower {option}; exit $?'  # so that bash stays the parent
        done = subprocess.run([bash, "-c", script], check=True, capture_output=True, text=True, env=environment)
        assert "completion" in done.stdout
    (installed,) = (tmp_path / ".bash_completions").iterdir()
    assert "_TRTOWER_COMPLETE=complete_bash" in installed.read_text()


def test_help_and_completion_do_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from trtower.cli import main; main()"
    for arguments, environment in (
        (["--help"], {}),
        (["export", "--help"], {}),
        (
            [],
            {
                "_TRTOWER_COMPLETE": "complete_bash",
                "COMP_WORDS": "trtower export --precision ",
                "COMP_CWORD": "3",
            },
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], check=False, capture_output=True, env=os.environ | environment
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout


def test_control_characters_of_a_path_do_not_reach_the_terminal() -> None:
    done = start("inspect", "no\x1b[31mred")
    assert b"\x1b" not in done.stderr
    assert b"no\\x1b[31mred" in done.stderr


@pytest.mark.parametrize("arguments", [["nosuch"], ["export"], ["inspect", "a", "b"], ["inspect", "--nosuch", "a"]])
def test_wrong_usage_names_the_help(arguments: list[str]) -> None:
    line = start(*arguments).stderr.decode()
    assert line.endswith(" --help.\n")
    assert len(line.splitlines()) == 1


def test_place_that_cannot_be_made_is_one_line_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x"
    done = start("export", "clip-vit-base-patch32", "--random-weights", "--no-check", "--out", str(out))
    assert (
        done.stderr.decode().splitlines()[-1].startswith(f"error: cannot make {tmp_path / 'file'}: File exists. Choose")
    )
