"""`trtower embed`, as a user types it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pictures import fill
from trtower.cli import run
from trtower.embedding.command import describe
from trtower.embedding.embed import EmbedProgress

TRTOWER = str(Path(sys.executable).parent / "trtower")


def test_features_and_what_was_left_out_are_summed_up(
    certified: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        (photos / f"{name}.jpg").write_bytes(b"no")
    command = ["embed", "photos", "--bundle", str(certified), "--out", "out", "--per-file", "4", "--batch", "2"]
    assert run(command) == 0
    printed, progress = capsys.readouterr()
    assert printed.splitlines() == [
        "out: 10 pictures, float32 (9 x 64), 4 files",
        *[f"left out: {name}.jpg: Pillow finds no picture in it" for name in "abc"],
        "left out in all: 4; out/_left_out.jsonl names them",
    ]
    assert "14 of 14, " in progress
    assert run([*command, "--json"]) == 0
    printed, progress = capsys.readouterr()
    assert json.loads(printed)["pictures"] == 10
    assert "14 of 14" not in progress


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing"], 2, "missing does not exist"),
        (["photos", "--max-megapixels", "0"], 2, "--max-megapixels is 0.0; expected a number above 0"),
        (["photos", "--max-mib", "nan"], 2, "--max-mib is nan; expected a number above 0"),
        (["photos", "--format", "csv"], 2, "unknown format 'csv'"),
        (["photos", "--threads", "0"], 2, "threads=0; expected a number of at least 1"),
        (["photos", "--select-layer", "x"], 2, "x"),
        (["photos", "--backend", "tensorrt"], 1, "no requested backend can run"),
        (["photos", "--workers", "2"], 2, "workers is for Ray only"),
        (["photos", "--max-mib", "0.001"], 1, "none of 10 pictures could be embedded; 000.png: its file has more"),
    ],
)
def test_wrong_use_is_one_line(
    certified: Path,
    photos: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert run(["embed", *arguments, "--bundle", str(certified), "--out", "out"]) == code
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_missing_packages_are_named(
    certified: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["embed", "photos", "--bundle", str(certified), "--out", "out"]
    assert run(command) == 1
    assert "writing Parquet needs the package pyarrow" in capsys.readouterr().err
    assert run([*command, "--format", "safetensors"]) == 0
    assert run([*command, "--format", "safetensors", "--ray", "local"]) == 1
    assert "embedding on Ray needs the package ray, which is not installed: pip install" in capsys.readouterr().err


def test_interrupted_command_goes_on_later(certified: Path, here: Path) -> None:
    fill(here / "many", range(2000))
    command = [TRTOWER, "embed", "many", "--bundle", str(certified), "--out", "out", "--per-file", "10"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the child would ignore it if this process does
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not [*here.glob("out/features-*")]:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.splitlines()[-2:] == ["out keeps its complete files; the same command goes on.", "error: interrupted"]
    assert not json.loads((here / "out" / "_embedding.json").read_text(encoding="utf-8"))["complete"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert " done before\n" in done.stderr
    assert json.loads(done.stdout)["pictures"] == 2000


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (EmbedProgress(done=0, total=10, before=0, seconds=0.0), ""),
        (EmbedProgress(done=0, total=10, before=7, seconds=0.0), "7 done before"),
        (EmbedProgress(done=5, total=10, before=0, seconds=2.0), "2.5 pictures a second, 0:02 left"),
        (EmbedProgress(done=1, total=101, before=0, seconds=1.5), "0.7 pictures a second, 2:30 left"),
        (EmbedProgress(done=1, total=10001, before=0, seconds=1.0), "1.0 pictures a second, 2:46:40 left"),
        (EmbedProgress(done=10, total=10, before=0, seconds=4.0), "2.5 pictures a second"),
    ],
)
def test_progress_in_words(progress: EmbedProgress, words: str) -> None:
    assert describe(progress) == words
