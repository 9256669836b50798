"""A benchmark races towers that compute the same thing, says who could not run, and holds itself to its goals."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from trtower import Bundle, VisionTower
from trtower.cli import run
from trtower.errors import ConfigError
from trtower_export.bench import benchmark as module
from trtower_export.bench.benchmark import Benchmark, BenchOptions, Cold, ListTiming, Timing, run_benchmark
from trtower_export.bench.ceiling import measure_ceilings
from trtower_export.bench.entrants import AGAINST, Arena, Entrant, enter
from trtower_export.bench.goals import YARDSTICK, judge_goals
from trtower_export.bench.tables import draw_benchmark, print_benchmark, to_json
from trtower_export.checkpoint import open_checkpoint
from trtower_export.latency import race
from trtower_export.progress import LoggedProgress

OPTIONS = BenchOptions(batches=(2, 1, 2), against=("eager", "cudagraph", "onnxruntime", "openvino"), rounds=3, tiles=4)

SAME_TOWER = 0.02
"""Relative error in half precision or better (7e-4 was seen in FP16, 9e-3 in BF16). A layer off makes more than 0.3."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens where there is no GPU")


@pytest.fixture(scope="module")
def found(clip_bundle: Path, checkpoints: dict[str, Path]) -> Benchmark:
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    return run_benchmark(Bundle.open(clip_bundle), checkpoint, OPTIONS, LoggedProgress())


def test_everybody_races_at_every_batch(found: Benchmark) -> None:
    racers = ("trtower", "llava", "eager", "onnxruntime")
    assert [(each.batch, each.entrant) for each in found.timings] == [(b, name) for b in (1, 2) for name in racers]
    assert {each.rounds for each in found.timings} == {3}
    assert [each.entrant for each in found.cold] == list(racers)


def test_who_cannot_race_is_named_with_the_reason(found: Benchmark) -> None:
    assert found.absent == {"cudagraph": "CUDA graphs need a GPU", "openvino": "it is what trtower runs here"}


def test_figures_follow_from_the_medians(found: Benchmark) -> None:
    medians = {(each.entrant, each.batch): each.median_s for each in found.timings}
    for each in found.timings:
        assert each.images_per_s == pytest.approx(each.batch / each.median_s)
        assert each.times_llava == pytest.approx(medians["llava", each.batch] / each.median_s)
        floor = each.batch * found.bundle["flop_an_image"] / found.ceilings[each.arithmetic]
        assert each.share == pytest.approx(floor / each.median_s)
        assert each.median_s <= each.p99_s


def test_towers_compute_the_same(found: Benchmark) -> None:
    assert max(each.error for each in found.timings) < SAME_TOWER
    assert next(each.error for each in found.timings if each.entrant == "llava") < 1e-5


@pytest.mark.parametrize("name", [name for name in AGAINST if "compile" not in name and name != "cudagraph"])
def test_every_entrant_reads_the_tower_of_the_bundle(
    export: Callable[..., Path], checkpoints: dict[str, Path], name: str
) -> None:
    """Whatever the layers and the tokens."""
    folder = export("dinov2", select_layer=(1, -2), select_feature="cls_patch", flavour="none")
    arena = Arena.open(Bundle.open(folder), open_checkpoint(str(checkpoints["dinov2"])), "onnxruntime-cpu")
    if name == "onnxruntime":
        arena = dataclasses.replace(arena, ran=VisionTower.load(folder, "openvino"))
    images = module.draw_images(arena, 2)
    entrant = enter(arena, name)
    features = entrant.call(entrant.prepare(images))
    assert features.shape == (2, 10, 128)
    assert module._error(features, arena.reference(images)) < SAME_TOWER


def test_half_precision_entrant_leaves_the_others_weights_alone(
    clip_bundle: Path, checkpoints: dict[str, Path]
) -> None:
    arena = Arena.open(Bundle.open(clip_bundle), open_checkpoint(str(checkpoints["clip"])))
    before = arena.reference(module.draw_images(arena, 1))
    full = enter(arena, "sdpa")
    enter(arena, "sdpa-bf16")
    images = full.prepare(module.draw_images(arena, 1))
    assert full.call(images).dtype == torch.float32
    assert torch.equal(arena.reference(images), before)


def test_time_and_memory_of_one_alone_are_its_own(found: Benchmark) -> None:
    cold = {each.entrant: each for each in found.cold}
    assert all(each.load_s > 0 and each.first_s > 0 for each in found.cold)
    assert cold["llava"].peak_bytes > cold["trtower"].peak_bytes  # transformers is in one of them alone


def test_list_is_raced_against_the_loop(found: Benchmark) -> None:
    assert found.tiles
    assert (found.tiles.images, found.tiles.rounds) == (4, 1)
    assert found.tiles.llava_s > 0 < found.tiles.trtower_s


def test_entrant_that_breaks_is_named_and_the_others_go_on(
    clip_bundle: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_eager(arena: Arena, name: str) -> Entrant:
        def fail(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no room for {len(images)}\nimages")

        entrant = enter(arena, name)
        return dataclasses.replace(entrant, call=fail) if name == "eager" else entrant

    monkeypatch.setattr(module, "enter", break_eager)
    monkeypatch.setattr(module, "_run_cold", lambda *_: None)
    options = dataclasses.replace(OPTIONS, against=("eager", "sdpa"), batches=(1,), tiles=0)
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    found = run_benchmark(Bundle.open(clip_bundle), checkpoint, options, LoggedProgress())
    assert found.absent == {"eager at batch 1": "no room for 1 images"}
    assert [each.entrant for each in found.timings] == ["trtower", "llava", "sdpa"]
    assert found.tiles is None


def test_entrant_that_breaks_alone_is_named(
    clip_bundle: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent: dict[str, str] = {}
    bundle, checkpoint = Bundle.open(clip_bundle), open_checkpoint(str(checkpoints["clip"]))
    gone = dataclasses.replace(checkpoint, source="nowhere/at-all")
    assert module._run_cold(bundle, gone, "eager", None, 1, absent) is None
    assert "CheckpointError" in absent["eager, alone"]


def test_competitors_run_in_turn_after_a_round_that_does_not_count() -> None:
    order: list[str] = []
    seconds = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_ceiling_is_of_arithmetic_that_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.measure_ceilings.__globals__["SIZE"], "cpu", 256)
    found = measure_ceilings(torch.device("cpu"), {"fp32", "bf16", "fp16", "int8"})
    assert sorted(found) == ["bf16", "fp32"]
    assert all(1e8 < flops < 1e15 for flops in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ("eager", "tensorrt-llm")}, "--against tensorrt-llm is unknown: eager, sdpa, .* are known"),
        ({"batches": (1, 0)}, "--batch 1 0: each is 1 at least"),
    ],
)
def test_what_cannot_be_raced_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**options)


def test_json_has_everything_and_where_it_was_measured(found: Benchmark) -> None:
    data = json.loads(to_json(found))
    assert len(data["timings"]) == len(found.timings)
    assert {"date", "processor", "threads", "versions", "device"} <= data["environment"].keys()
    assert data["environment"]["versions"]["torch"] == torch.__version__
    assert data["bundle"]["precision"] == "fp16"


def test_table_is_whole_on_a_narrow_console_and_names_who_did_not_run(found: Benchmark) -> None:
    stream = io.StringIO()
    print_benchmark(Console(file=stream, width=40), found)
    text = stream.getvalue()
    for each in found.timings:
        assert f"{each.median_s * 1e3:.1f}" in text
        assert each.runs_on in text
    assert "cudagraph did not run: CUDA graphs need a GPU" in text
    assert "…" not in text
    assert "MISSED" not in text  # the goals are another tower's


def test_plot_has_a_bar_for_each(found: Benchmark) -> None:
    one = dataclasses.replace(found, timings=found.timings[:1])
    heights = [Image.open(io.BytesIO(draw_benchmark(each))).height for each in (one, found)]
    assert heights[1] - heights[0] == 60 * (len(found.timings) - 1)


def timing(entrant: str, batch: int, median_s: float, share: float | None = None) -> Timing:
    return Timing(
        entrant=entrant,
        runs_on="",
        arithmetic="fp16",
        batch=batch,
        rounds=1,
        median_s=median_s,
        p99_s=median_s,
        images_per_s=batch / median_s,
        share=share,
        times_llava=None,
        error=0.0,
    )


def yardstick() -> Any:
    family, image_size, patch_size, num_layers = YARDSTICK
    return SimpleNamespace(family=family, image_size=image_size, patch_size=patch_size, num_layers=num_layers)


def test_goals_of_a_plan_are_met_or_missed_by_the_ratio() -> None:
    timings = [
        *(timing("trtower", batch, 1.0, share=0.7) for batch in (1, 8, 32)),
        *(timing("sdpa", batch, seconds) for batch, seconds in ((1, 1.5), (8, 1.49), (32, 2.0))),
        timing("compile", 1, 1.15),
    ]
    cold = (Cold(entrant="trtower", load_s=1.5, first_s=0.6, peak_bytes=1),)
    tiles = ListTiming(images=16, rounds=1, llava_s=2.9, trtower_s=1.0)
    goals = judge_goals(yardstick(), "tensorrt", timings, cold, tiles)
    assert [(goal.met, goal.measured) for goal in goals] == [
        (True, 1.5),
        (False, 1.49),
        (True, 2.0),
        (True, 1.15),
        (False, None),
        (False, None),
        (True, 0.7),
        (False, 2.9),
        (False, pytest.approx(2.1)),
    ]


def test_goals_of_a_plan_are_not_judged_on_another_backend() -> None:
    timings = [timing("trtower", 1, 1.0), timing("sdpa", 1, 9.0), timing("llava", 1, 4.0)]
    cold = (Cold(entrant="trtower", load_s=1.0, first_s=0.5, peak_bytes=1),)
    goals = judge_goals(yardstick(), "openvino-bf16", timings, cold, None)
    assert [goal.measured for goal in goals] == [None] * 8 + [4.0, 1.5]
    assert all(goal.note for goal in goals[:8])
    assert [goal.met for goal in goals[8:]] == [True, True]


def test_command_writes_what_it_is_asked_for(
    clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch", "1", "1", "1", "--against", "", "--rounds", "1", "--tiles", "0"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert run(["bench", str(clip_bundle), *options, *files]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["tiles"] is None
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "trtower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "nowhere/b.json"], "nowhere/b.json cannot be written: a .json in a folder that exists"),
        (["--plot", "b.svg"], "b.svg cannot be written: a .png in a folder that exists"),
        (["--against", "eager,vllm"], "--against vllm is unknown"),
        (["--batch", "0", "1", "2"], "--batch 0 1 2: each is 1 at least"),
        (["--backend", "cuda"], "backend 'cuda' is unknown"),
        (["--backend", "tensorrt"], "tensorrt"),
    ],
)
def test_bad_input_is_one_line(
    clip_bundle: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(clip_bundle), *arguments]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
