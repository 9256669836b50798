"""judge.py compares the results of `trtower bench` with our goals, and reports each missed goal."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.judge import FLOP_AN_IMAGE, judge

ROOT = Path(__file__).parent.parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("vit-l-*.json"))


def timing(entrant: str, batch: int, median_s: float, share: float | None = None) -> dict[str, Any]:
    return {"entrant": entrant, "batch": batch, "median_s": median_s, "share": share, "runs_on": ""}


def measured(runs_on: str, *timings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    ours = [each | {"runs_on": runs_on} if each["entrant"] == "trtower" else each for each in timings]
    device = "cpu" if "CPU" in runs_on else "cuda"
    return {
        "bundle": {"name": "vit-l", "flop_an_image": FLOP_AN_IMAGE},
        "environment": {"device": device},
        "timings": ours,
        "cold": [],
        "tiles": None,
    } | changes


def verdicts(benchmark: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the verdict on each goal, with the ratio or the reason why there is none."""
    return [(line.partition(":")[0], line.rpartition(": ")[2]) for line in judge(benchmark)]


def cold(load_s: float, first_s: float) -> list[dict[str, Any]]:
    return [{"entrant": "trtower", "load_s": load_s, "first_s": first_s}]


def test_goals_of_a_plan_are_met_or_missed_by_the_ratio() -> None:
    results = measured(
        "tensorrt 11.4.0, sm90",
        *(timing("trtower", batch, 1.0, share=0.7) for batch in (1, 8, 32)),
        *(timing("sdpa", batch, seconds) for batch, seconds in ((1, 1.5), (8, 1.49), (32, 2.0))),
        timing("compile", 1, 1.15),
        cold=cold(1.5, 0.6),
        tiles={"images": 16, "llava_s": 2.9, "trtower_s": 1.0},
    )
    assert verdicts(results) == [
        ("met", "1.50"),
        ("MISSED", "1.49"),
        ("met", "2.00"),
        ("met", "1.15"),
        ("not measured", "compile did not run at batch 8"),
        ("not measured", "compile did not run at batch 32"),
        ("met", "0.70"),
        ("MISSED", "2.90"),
        ("MISSED", "2.10"),
    ]


def test_goals_of_a_plan_are_not_judged_on_another_backend() -> None:
    timings = [timing("trtower", 1, 1.0), timing("sdpa", 1, 9.0), timing("llava", 1, 4.0)]
    results = verdicts(measured("openvino 2026.4.1, CPU, BF16", *timings, cold=cold(1.0, 0.5)))
    assert results[:7] == [("not measured", "needs a GPU that runs a plan")] * 7
    assert results[7:] == [("not measured", "no list of this size was raced"), ("met", "4.00"), ("met", "1.50")]


def test_goal_that_was_not_measured_says_why() -> None:
    timings = [timing("trtower", batch, 1.0) for batch in (1, 32)] + [timing("sdpa", 1, 2.0)]
    tiles = {"images": 15, "llava_s": 9.0, "trtower_s": 1.0}
    assert verdicts(measured("tensorrt-rtx 1.7.1, sm89", *timings, tiles=tiles))[1:] == [
        ("not measured", "trtower and sdpa did not run at batch 8"),
        ("not measured", "sdpa did not run at batch 32"),
        ("not measured", "compile did not run at batch 1"),
        ("not measured", "trtower and compile did not run at batch 8"),
        ("not measured", "compile did not run at batch 32"),
        ("not measured", "the ceiling was not measured"),
        ("not measured", "no list of this size was raced"),
        ("not measured", "trtower has no cold start"),
    ]
    without_32 = verdicts(measured("tensorrt-rtx 1.7.1, sm89", timing("trtower", 1, 1.0)))
    assert without_32[6] == ("not measured", "trtower did not run at batch 32")


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [sys.executable, ROOT / "benchmarks" / "judge.py", *paths]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_goals_apply_to_one_tower(tmp_path: Path) -> None:
    results = measured("openvino", timing("trtower", 1, 1.0))
    results["bundle"] = {"name": "vit-b", "flop_an_image": 35e9}
    (tmp_path / "b.json").write_text(json.dumps(results))
    done = run(tmp_path / "b.json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert (
        "is a benchmark of vit-b, 35.0 GFLOP per image; the goals are for CLIP ViT-L/14-336, 366 GFLOP" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_page_has_the_verdicts_on_the_stored_results(path: Path) -> None:
    done = run(path)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(
        rf"`python benchmarks/judge.py benchmarks/results/{path.name}`.*?```\n(.*?)```", page, re.DOTALL
    )
    assert blocks == [done.stdout]


def test_make_bench_ends_with_the_verdicts() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nbench: ")[2].partition("\n\n")[0]
    assert re.search(r"trtower bench .*>\S+\.json && \\\n.*benchmarks/judge\.py \S+\.json", recipe, re.DOTALL)
