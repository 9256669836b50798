"""A benchmark races towers that compute the same thing, and reports who could not run."""

import dataclasses
import io
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from trtower import Bundle, VisionTower
from trtower.cli import run
from trtower.errors import BackendError, CheckpointError, ConfigError
from trtower.runners.openvino import has_bf16
from trtower.runners.race import race
from trtower.spec import BatchProfile
from trtower_export.bench import benchmark as module
from trtower_export.bench import entrants, environment
from trtower_export.bench.benchmark import BenchOptions, run_benchmark
from trtower_export.bench.ceiling import measure_ceilings
from trtower_export.bench.entrants import Arena, Entrant, competitors, enter
from trtower_export.bench.environment import read_driver
from trtower_export.bench.results import Benchmark, ColdStart, Timing
from trtower_export.bench.tables import _rate, draw_benchmark, label_entrant, print_benchmark
from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trtower_export.console import LoggedProgress, as_json
from trtower_export.options import Trust

OPTIONS = BenchOptions(batches=(2, 1, 2), against=("eager", "cudagraph", "onnxruntime", "openvino"), rounds=3, tiles=4)

SAME_TOWER = 0.02
"""Relative error in half precision or better (measured: 7e-4 in FP16, 9e-3 in BF16). One layer off makes over 0.3."""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")


@pytest.fixture(scope="module")
def bundle(clip_bundle: Path) -> Bundle:
    return Bundle.open(clip_bundle)


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, Path]) -> Checkpoint:
    return open_checkpoint(str(checkpoints["clip"]))


@pytest.fixture
def arena(bundle: Bundle, checkpoint: Checkpoint) -> Arena:
    return Arena.open(bundle, checkpoint)


ELSEWHERE = ("cudagraph", "openvino-int8", "torch-bf16", "torch-bf16-compile", "torch-compile")
"""Entrants that need a GPU or a bundle in BF16, and one that tests/runtime/runners/test_torch_compiled.py enters."""

RACERS = [
    pytest.param(name, marks=pytest.mark.slow if name.startswith("compile") else ())
    for name in competitors()
    if name not in ELSEWHERE
]
"""The others; torch.compile takes half a minute."""


@pytest.fixture
def torch_arena(bundle: Bundle, checkpoint: Checkpoint) -> Arena:
    return Arena.open_torch(bundle, checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def result(bundle: Bundle, checkpoint: Checkpoint) -> Benchmark:
    return run_benchmark(bundle, checkpoint, OPTIONS, LoggedProgress())


def printed(result: Benchmark, width: int) -> str:
    stream = io.StringIO()
    print_benchmark(Console(file=stream, width=width), result)
    return stream.getvalue()


def test_every_entrant_races_at_every_batch(result: Benchmark) -> None:
    racers = ("trtower", "llava", "eager", "onnxruntime")
    assert [(each.batch, each.entrant) for each in result.timings] == [(b, name) for b in (1, 2) for name in racers]
    assert {each.rounds for each in result.timings} == {3}
    assert [each.entrant for each in result.cold] == list(racers)


def test_entrant_that_cannot_race_is_named_with_the_reason(result: Benchmark) -> None:
    ours = "the bundle itself already runs on this backend here"
    assert result.absent == {"cudagraph": "CUDA graphs need a GPU", "openvino": ours}


def test_figures_follow_from_the_medians(result: Benchmark) -> None:
    medians = {(each.entrant, each.batch): each.median_s for each in result.timings}
    for each in result.timings:
        assert each.images_per_s == pytest.approx(each.batch / each.median_s)
        assert each.times_llava == pytest.approx(medians["llava", each.batch] / each.median_s)
        floor = each.batch * result.bundle["flop_an_image"] / result.ceilings[each.arithmetic]
        assert each.share == pytest.approx(floor / each.median_s)
        assert each.median_s <= each.p99_s


def test_all_entrants_compute_the_same(result: Benchmark) -> None:
    assert all(each.error is not None and each.error < SAME_TOWER for each in result.timings)
    assert next(each.error for each in result.timings if each.entrant == "llava") < 1e-5


@pytest.mark.parametrize("name", ["trtower", "llava", *RACERS])
def test_every_entrant_reads_the_tower_of_the_bundle(
    export: Callable[..., Path], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With any layers and tokens."""
    if name == "openvino-bf16" and not has_bf16(pytest.importorskip("openvino")):
        pytest.skip("this processor has no BF16 arithmetic")
    monkeypatch.setattr(entrants, "multiplies_bf16", lambda: True)  # a small tower is fast even without it
    folder = export("dinov2", select_layer=(1, -2), select_feature="cls_patch", flavour="none")
    arena = Arena.open(Bundle.open(folder), open_checkpoint(str(checkpoints["dinov2"])), "onnxruntime-cpu")
    if name == "onnxruntime":
        arena = dataclasses.replace(arena, ran=VisionTower.load(folder, "openvino"))
    images = arena.draw(2)
    entrant = enter(arena, name)
    features = entrant.call(entrant.prepare(images))
    assert features.shape == (2, 10, 128)
    assert module._error(features, arena.reference(images)) < SAME_TOWER


@pytest.mark.parametrize(("flags", "multiplies"), [("avx2 fma", False), ("avx2 avx512_bf16", True)])
def test_pytorch_races_in_bf16_if_the_processor_has_it(
    torch_arena: Arena, monkeypatch: pytest.MonkeyPatch, flags: str, *, multiplies: bool
) -> None:
    monkeypatch.setattr("trtower.runners.processor.processor_fields", lambda: {"flags": flags})
    if multiplies:
        assert enter(torch_arena, "sdpa-bf16").arithmetic == "bf16"
    else:
        with pytest.raises(BackendError, match="this processor has no BF16 arithmetic"):
            enter(torch_arena, "sdpa-bf16")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model name": "AMD EPYC", "flags": "fpu avx2 avx512_bf16"}, "AMD EPYC (avx2, avx512_bf16)"),
        ({"Features": "fp asimd sve bf16"}, f"{platform.machine()} (asimd, sve, bf16)"),
        ({"model name": "old"}, "old"),
    ],
)
def test_processor_is_named_with_its_vector_units(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], name: str
) -> None:
    monkeypatch.setattr(environment, "processor_fields", lambda: fields)
    assert environment._processor() == name


def test_half_precision_entrant_does_not_change_other_weights(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrants, "multiplies_bf16", lambda: True)
    before = arena.reference(arena.draw(1))
    full = enter(arena, "sdpa")
    enter(arena, "sdpa-bf16")
    images = full.prepare(arena.draw(1))
    assert full.call(images).dtype == torch.float32
    assert torch.equal(arena.reference(images), before)


def test_cold_start_measures_its_own_process(result: Benchmark) -> None:
    cold = {each.entrant: each for each in result.cold}
    assert all(each.load_s > 0 and each.first_s > 0 for each in result.cold)
    assert cold["llava"].peak_bytes > cold["trtower"].peak_bytes  # only llava imports transformers


def test_list_is_raced_against_the_loop(result: Benchmark) -> None:
    assert result.tiles
    assert (result.tiles.images, result.tiles.rounds) == (4, 3)
    assert result.tiles.llava_s > 0 < result.tiles.trtower_s


def test_both_towers_read_the_whole_list(arena: Arena, count_calls: Callable[[VisionTower], list[int]]) -> None:
    ours, llavas = count_calls(arena.tower), list[int]()

    def count(images: torch.Tensor) -> torch.Tensor:
        llavas.append(len(images))
        return images

    llava = dataclasses.replace(enter(arena, "llava"), call=count)
    timing = module._race_over_a_list(arena, [enter(arena, "trtower"), llava], 6, 2, {})
    assert timing is not None
    assert timing == dataclasses.replace(timing, images=6, rounds=2)
    assert ours == [4, 2] * 3  # one uncounted round and two that count
    assert llavas == [1] * 18


def test_list_that_does_not_run_is_named_and_other_results_stay(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room for\nso many")

    monkeypatch.setattr(Arena, "draw", fail)
    absent: dict[str, str] = {}
    entrants = [enter(arena, "trtower"), enter(arena, "llava")]
    assert module._race_over_a_list(arena, entrants, 6, 1, absent) is None
    assert module._race(arena, entrants, 2, 1, {}, absent) == []
    assert absent == {"a list of 6": "no room for so many", "batch 2": "no room for so many"}


def test_bundle_that_does_not_run_is_an_error(export: Callable[..., Path], checkpoint: Checkpoint) -> None:
    folder = export("clip", flavour="none", profiles=(BatchProfile(min=2, opt=2, max=4),))
    options = dataclasses.replace(OPTIONS, batches=(1,), against=(), rounds=1)
    with pytest.raises(BackendError, match="did not run: images has batch 1; this engine accepts 2 to 4 at once"):
        run_benchmark(Bundle.open(folder), checkpoint, options, LoggedProgress())


def test_checkpoint_with_other_weights_is_refused(bundle: Bundle, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(checkpoints["clip"], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.fc1.weight"))
    save_file({**weights, name: 2 * weights[name]}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="are not the ones that"):
        run_benchmark(bundle, open_checkpoint(str(other)), OPTIONS, LoggedProgress())


def test_trust_in_a_checkpoint_reaches_the_cold_start(
    bundle: Bundle, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    pickled = Path(shutil.copytree(checkpoints["clip"], tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    checkpoint = open_checkpoint(str(pickled), trust=Trust(allow_pickle=True))
    absent: dict[str, str] = {}
    assert module._run_cold(bundle, checkpoint, "sdpa", None, "cpu", 1, absent), absent


def test_copy_in_the_same_precision_shares_its_weights(torch_arena: Arena) -> None:
    torch_arena.uncut.model.to(torch.bfloat16)
    before = {id(parameter) for parameter in torch_arena.uncut.model.parameters()}
    assert {id(parameter) for parameter in entrants._copy_of(torch_arena, "bf16").model.parameters()} == before
    assert not {id(parameter) for parameter in entrants._copy_of(torch_arena, "fp32").model.parameters()} & before


def test_entrant_that_breaks_is_named_and_the_others_go_on(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_eager(arena: Arena, name: str) -> Entrant:
        def fail(images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no room for {len(images)}\nimages")

        entrant = enter(arena, name)
        return dataclasses.replace(entrant, call=fail) if name == "eager" else entrant

    monkeypatch.setattr(module, "enter", break_eager)
    monkeypatch.setattr(module, "_run_cold", lambda *_: None)
    options = dataclasses.replace(OPTIONS, against=("eager", "sdpa"), batches=(1,), tiles=0)
    result = run_benchmark(bundle, checkpoint, options, LoggedProgress())
    assert result.absent == {"eager at batch 1": "no room for 1 images"}
    assert [each.entrant for each in result.timings] == ["trtower", "llava", "sdpa"]
    assert result.tiles is None


def test_entrant_that_breaks_in_the_race_is_out_and_the_others_go_on() -> None:
    calls, dropped = [], dict[str, str]()

    def tire() -> None:
        calls.append("a")
        if len(calls) == 3:
            raise RuntimeError("no more")

    seconds = race({"a": tire, "b": lambda: None}, rounds=4, drop=lambda name, err: dropped.update({name: str(err)}))
    assert {name: len(times) for name, times in seconds.items()} == {"b": 4}
    assert dropped == {"a": "no more"}
    with pytest.raises(RuntimeError, match="no more"):
        race({"a": lambda: calls.clear() or calls.extend("aa") or tire()}, rounds=1)


@pytest.mark.parametrize("stdout", ["", "a line of a library's\n"])
def test_cold_start_without_a_result_is_named(
    bundle: Bundle, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, stdout: str
) -> None:
    absent: dict[str, str] = {}
    done = SimpleNamespace(returncode=0, stdout=stdout, stderr="")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
    assert module._run_cold(bundle, checkpoint, "eager", None, "cpu", 1, absent) is None
    assert absent == {"cold start of eager": "exit status 0"}
    done.stdout = '{"load_s": 1.0, "first_s": 2.0, "peak_bytes": 3}\nand a line after it\n'
    result = module._run_cold(bundle, checkpoint, "eager", None, "cpu", 1, absent)
    assert result == ColdStart(entrant="eager", load_s=1.0, first_s=2.0, peak_bytes=3)


def test_entrant_that_breaks_in_its_cold_start_is_named(bundle: Bundle, checkpoint: Checkpoint) -> None:
    absent: dict[str, str] = {}
    gone = dataclasses.replace(checkpoint, source="nowhere/at-all")
    assert module._run_cold(bundle, gone, "eager", None, "cpu", 1, absent) is None
    assert "CheckpointError" in absent["cold start of eager"]


def test_competitors_run_in_turn_after_an_uncounted_round() -> None:
    order: list[str] = []
    seconds = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_ceiling_is_measured_only_for_arithmetic_of_the_device() -> None:
    ceilings = measure_ceilings(torch.device("cpu"), {"fp32", "bf16", "fp16", "int8"})
    assert sorted(ceilings) == ["bf16", "fp32"]
    assert all(1e8 < flops < 1e15 for flops in ceilings.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ("eager", "foo")}, "^unknown competitor 'foo'; choose eager, .* or torch-compile"),
        ({"against": ("compiled",)}, "'compiled'; did you mean 'compile'"),
        ({"batches": (1, 0)}, "--batch 1,0: each must be at least 1"),
        ({"against": ("eager", "sdpa", "eager")}, "--against eager,sdpa,eager has a duplicate"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**options)


def test_version_of_the_driver_is_read_from_its_kernel_module(tmp_path: Path) -> None:
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: 14.2\n"
    )
    assert read_driver(tmp_path / "version") == "580.159.04"
    assert read_driver(tmp_path / "none") is None


def test_rate_in_the_plot_has_no_exponent() -> None:
    assert [_rate(rate) for rate in (0.4587, 27.76, 1328.45)] == ["0.459", "27.8", "1328"]


def test_json_has_all_results_and_the_environment(result: Benchmark) -> None:
    data = json.loads(as_json(result))
    assert len(data["timings"]) == len(result.timings)
    assert {"date", "processor", "threads", "versions", "device"} <= data["environment"].keys()
    assert data["environment"]["versions"]["torch"] == torch.__version__
    assert data["bundle"]["precision"] == "fp16"
    assert data.keys() == {"bundle", "environment", "ceilings", "timings", "cold", "tiles", "absent"}


def test_table_is_complete_on_a_narrow_console_and_names_who_did_not_run(result: Benchmark) -> None:
    text = printed(result, width=40)
    for each in result.timings:
        assert f"{each.median_s * 1e3:.1f}" in text
        assert each.runs_on in text
    assert "cudagraph did not run: CUDA graphs need a GPU" in text
    assert "…" not in text


def test_error_that_is_not_finite_is_null_in_json_and_text_in_the_table(result: Benchmark) -> None:
    assert module._error(torch.full((1, 2), torch.inf), torch.ones(1, 2)) is None
    assert module._error(torch.ones(1, 2), torch.ones(1, 2)) == 0.0
    broken = dataclasses.replace(result, timings=(dataclasses.replace(result.timings[0], error=None),))
    assert json.loads(as_json(broken))["timings"][0]["error"] is None
    assert "not finite" in printed(broken, width=200)


def test_output_names_the_bundle_and_says_if_the_machine_was_busy(result: Benchmark) -> None:
    even = tuple(dataclasses.replace(each, p99_s=1.4 * each.median_s) for each in result.timings)
    uneven = (*even[:-1], dataclasses.replace(even[-1], p99_s=2.5 * even[-1].median_s))
    texts = [printed(dataclasses.replace(result, timings=timings), width=200) for timings in (even, uneven)]
    assert all(f"{result.bundle['path']}: fp16, not certified for this backend" in text for text in texts)
    assert ["this machine was busy" in text for text in texts] == [False, True]
    assert f"{uneven[-1].entrant} took up to 2.5 times its median" in texts[1]


def test_99th_percentile_of_a_few_rounds_is_the_longest() -> None:
    few, many = [1.0, 2.0, 9.0], [*(1.0 for _ in range(199)), 9.0]
    entrant: Any = SimpleNamespace(name="a", runs_on="", arithmetic="fp32")
    timings = [module._timing(entrant, 1, seconds, None, None, 0.0) for seconds in (few, many)]
    assert [(each.median_s, each.p99_s) for each in timings] == [(2.0, 9.0), (1.0, 1.0)]


def test_ceiling_counts_two_flop_per_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure_ceilings.__globals__["SIZE"], "cpu", 100)
    monkeypatch.setitem(
        measure_ceilings.__globals__, "race", lambda *_, **__: {"torch": [0.5], "openvino": [0.9, 0.25]}
    )
    assert measure_ceilings(torch.device("cpu"), {"fp32"}) == {"fp32": 2 * 100**3 / 0.25}


def test_plot_has_a_bar_for_each_timing(result: Benchmark) -> None:
    one = dataclasses.replace(result, timings=result.timings[:1])
    heights = [Image.open(io.BytesIO(draw_benchmark(each))).height for each in (one, result)]
    assert heights[1] - heights[0] == 60 * (len(result.timings) - 1)


@pytest.mark.parametrize(
    ("runs_on", "label"),
    [
        ("onnxruntime 1.32.0, CPU", "trtower on ONNX Runtime (fp16)"),
        ("tensorrt-rtx 1.7.1, sm89", "trtower on TensorRT-RTX (fp16)"),
        ("tensorrt 11.4.0, sm90", "trtower on TensorRT (fp16)"),
        ("openvino 2026.4.1, CPU, FP32", "trtower on OpenVINO (fp16)"),
    ],
)
def test_plot_names_the_backend_that_ran(runs_on: str, label: str) -> None:
    assert label_entrant(dataclasses.replace(timing("trtower"), runs_on=runs_on)) == label
    assert label_entrant(dataclasses.replace(timing("sdpa"), runs_on="PyTorch 2.13.0")) == "sdpa (fp16)"


def test_plot_labels_each_batch_once(result: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("trtower_export.bench.tables.to_png", lambda figure: figures.append(figure) or b"")
    draw_benchmark(result)
    (axes,) = figures[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text.startswith("batch")] == ["batch 1", "batch 2"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [label_entrant(each) for each in result.timings]
    assert names[0] == "trtower on OpenVINO (fp32)"


def timing(entrant: str) -> Timing:
    return Timing(
        entrant=entrant,
        runs_on="",
        arithmetic="fp16",
        batch=1,
        rounds=1,
        median_s=1.0,
        p99_s=1.0,
        images_per_s=1.0,
        share=None,
        times_llava=None,
        error=0.0,
    )


def test_command_writes_json_and_plot(clip_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "1,1,1", "--against", "", "--rounds", "1", "--tiles", "0"]
    assert run(["bench", str(clip_bundle), *options, "--json", "--plot", str(tmp_path / "b.png")]) == 0
    assert json.loads(capsys.readouterr().out)["tiles"] is None
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("batch", [["1, 2"], pytest.param(["1", "--batch", "2"], marks=pytest.mark.slow)])
def test_command_races_at_the_given_batches(
    clip_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], batch: list[str]
) -> None:
    monkeypatch.setattr(module, "_run_cold", lambda *_: None)
    options = ["--against", "", "--rounds", "1", "--tiles", "0", "--json", "--batch", *batch]
    assert run(["bench", str(clip_bundle), *options]) == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert {each["batch"] for each in timings} == {1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "b.json"], "unexpected extra argument"),
        (["--plot", "b.svg"], "b.svg cannot be written: expected a .png in an existing folder"),
        (["--against", "eager,pytorch"], "did you mean 'torch', 'eager', 'sdpa' or 'compile'?"),
        (["--batch", "1", "2"], "(2): separate the numbers after --batch with commas"),
        (["--batch", "0,1,2"], "--batch 0,1,2: each must be at least 1"),
        (["--batch", "a"], "--batch a: expected whole numbers separated by commas, such as 1,8,32"),
        (["--backend", "cuda"], "unknown backend 'cuda'; did you mean 'tensorrt'"),
        (["--backend", "tensorrt"], "tensorrt"),
    ],
)
def test_bad_input_is_a_one_line_error(
    clip_bundle: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(clip_bundle), *arguments]) in (1, 2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
