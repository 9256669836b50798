"""`trtower tune` races the backends of a bundle on a device, and `auto` follows the result as long as it holds."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import geometric_mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtower import Bundle, VisionTower, tune_bundle
from trtower.bundle.manifest import MANIFEST, Manifest
from trtower.bundle.tuning import BackendTimes, Tuning
from trtower.cli import run
from trtower.errors import BackendError, BundleError, ConfigError
from trtower.inspection import as_text, inspect_bundle
from trtower.runners import choose as choosing
from trtower.runners import fastest, processor, tune
from trtower.runners import race as racing
from trtower.runners.base import Runner
from trtower.runners.choose import BACKENDS, candidates, choose
from trtower.runners.fastest import KnownTuning, fastest_first
from trtower.spec import BatchProfile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="covers machines without a GPU")

SECONDS = {"torch-cpu": 0.1, "onnxruntime-cpu": 0.2, "openvino": 0.3, "torch-bf16": 0.4, "openvino-bf16": 0.01}
"""An order that no table has."""

NAMED = ("tensorrt", "tensorrt-rtx", "torch-cuda", "onnxruntime-cuda", "openvino", "onnxruntime-cpu", "torch-cpu")


@pytest.fixture
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Let every call run once, and take as long as this says."""
    seconds = dict(SECONDS)

    def race(calls: dict[str, Callable[[], None]], *, rounds: int, drop: Any, on_gpu: bool) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [seconds[name]] * rounds for name in calls}

    monkeypatch.setattr(tune, "race", race)
    return seconds


def test_it_says_that_the_machine_may_have_been_busy(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {name: [1.0] * 4 + [2.0 if name == "openvino" else 1.4] for name in SECONDS}
    monkeypatch.setattr(tune, "race", lambda calls, **_: {name: times[name] for name in calls})
    lines: list[str] = []
    tune_bundle(Bundle.open(spoilt), on_step=lines.append)
    (line,) = (each for each in lines if "busy" in each)
    assert line == "openvino took up to 2.0 times its median: if the machine was busy, tune again when idle"


def test_it_times_every_backend_that_runs_here_at_the_batches_asked_for(spoilt: Path) -> None:
    lines: list[str] = []
    tuned = tune_bundle(Bundle.open(spoilt), batches=[3, 1], on_step=lines.append)
    (tuning,) = Bundle.open(spoilt).manifest.tunings
    assert tuned.manifest.tunings == (tuning,)
    assert (tuning.kind, tuning.batches) == ("cpu", (1, 3))
    runs = {each.backend for each in candidates(tuned) if not each.obstacle}
    assert {each.backend for each in tuning.backends} == runs >= {"openvino", "onnxruntime-cpu", "torch-cpu"}
    means = [geometric_mean(each.seconds) for each in tuning.backends]
    assert means == sorted(means)
    assert tuning.versions["torch"] == torch.__version__
    assert "timing batch 3 …" in lines
    assert any(line.startswith("torch-bf16 is not timed: it is for bundles in bf16") for line in lines)


def test_a_cpu_is_timed_at_the_smallest_batch_and_a_gpu_at_those_of_the_profiles(clip_bundle: Path) -> None:
    bundle = Bundle.open(clip_bundle)
    assert tune._sizes(bundle, torch.device("cpu"), None) == [1]
    assert tune._sizes(bundle, torch.device("cuda", 0), None) == [1, 2, 4]


def test_auto_follows_it(spoilt: Path, made_up_times: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    assert choose(Bundle.open(spoilt)).backend == "openvino"
    tuned = tune_bundle(Bundle.open(spoilt))
    with caplog.at_level(logging.INFO, logger="trtower"):
        assert VisionTower.load(spoilt).backend.startswith("torch ")
    (record,) = (each for each in caplog.records if "runs on torch" in each.getMessage())
    assert f"CPU, FP32, by the tuning of {tuned.manifest.tunings[0].date}; passed over" in record.getMessage()
    assert record.levelno == logging.INFO
    assert choose(tuned, "openvino").backend == "openvino"
    assert choose(tuned, "onnxruntime").backend == "onnxruntime-cpu"


def test_a_coarse_backend_stays_passed_over_however_fast(spoilt: Path, made_up_times: dict[str, float]) -> None:
    tuned = tune_bundle(Bundle.open(spoilt))
    if tuned.manifest.tunings[0].backends[0].backend != "openvino-bf16":
        pytest.skip("this processor has no BF16 arithmetic")
    assert choose(tuned).backend == "torch-cpu"
    assert f"trtower check {spoilt} --backend openvino-bf16" in tune.as_text(tuned, tuned.manifest.tunings[0])


def change(tuned: Bundle, **changes: Any) -> Bundle:
    """Change a bundle's only tuning."""
    (tuning,) = tuned.manifest.tunings
    return Bundle(tuned.path, replace(tuned.manifest, tunings=(replace(tuning, **changes),)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"versions": {"torch": "2.0"}}, "torch was 2.0, and is "),
        ({"versions": {"torch": "2.0"}}, "onnxruntime was not installed, and is "),
        ({"device": "Another CPU, 2 threads"}, "on Another CPU, 2 threads, because this is "),
        ({"kind": "cuda", "device": "NVIDIA L4"}, ""),
    ],
)
def test_it_is_ignored_elsewhere_and_with_other_versions_and_auto_says_so(
    spoilt: Path, made_up_times: dict[str, float], changes: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = change(tune_bundle(Bundle.open(spoilt)), **changes)
    with caplog.at_level(logging.INFO, logger="trtower"):
        assert choose(bundle).backend == "openvino"
    (record,) = (each for each in caplog.records if "runs on openvino" in each.getMessage())
    assert record.levelno == (logging.WARNING if why else logging.INFO)
    assert ("ignored the tuning of " in record.getMessage()) == bool(why)
    assert why in record.getMessage()
    assert (f": trtower tune {spoilt}" in record.getMessage()) == bool(why)


def test_it_is_ignored_with_another_number_of_threads(spoilt: Path, made_up_times: dict[str, float]) -> None:
    tuned = tune_bundle(Bundle.open(spoilt))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert choose(tuned).backend == "openvino"
    finally:
        torch.set_num_threads(threads)
    assert choose(tuned).backend == "torch-cpu"


def test_it_is_ignored_on_a_processor_of_the_same_name_with_other_flags(
    spoilt: Path, made_up_times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune_bundle(Bundle.open(spoilt))
    fields = processor.processor_fields()
    monkeypatch.setattr(processor, "processor_fields", lambda: {**fields, "flags": f"{fields.get('flags')} more"})
    assert choose(tuned).backend == "openvino"


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_names_that_have_no_order_here_do_not_mention_it(
    spoilt: Path, made_up_times: dict[str, float], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    bundle = change(tune_bundle(Bundle.open(spoilt)), versions={})
    with caplog.at_level(logging.INFO, logger="trtower"):
        choose(bundle, name)
    assert "tuning" not in caplog.text
    assert all(each.levelno == logging.INFO for each in caplog.records)


def test_a_choice_that_was_not_timed_is_not_said_to_follow_it(
    spoilt: Path, made_up_times: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = change(tune_bundle(Bundle.open(spoilt)), backends=tuning_of("cpu", "of another trtower").backends)
    with caplog.at_level(logging.INFO, logger="trtower"):
        assert choose(bundle).backend == "openvino"
    assert "by the tuning" not in caplog.text


def test_the_gpu_asked_for_is_the_one_that_is_timed(
    spoilt: Path, made_up_times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        inside.append(str(device))
        yield
        inside.clear()

    def open_none(*_: object) -> Iterator[Runner]:
        assert inside == ["cuda:1"]
        yield from ()

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(tune, "device_obstacle", lambda _: None)
    monkeypatch.setattr(tune, "_open", open_none)
    with pytest.raises(BackendError, match=r"no backend ran the graph of .* on cuda:1"):
        tune_bundle(Bundle.open(spoilt), device="cuda:1")


@pytest.mark.parametrize(("gpu", "on_gpu", "clock"), [(True, False, "cpu"), (True, None, "gpu"), (False, None, "cpu")])
def test_calls_on_a_cpu_are_timed_by_the_clock_also_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, *, gpu: bool, on_gpu: bool | None, clock: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name, seconds in (("cpu", 1.0), ("gpu", 2.0)):
        monkeypatch.setattr(racing, f"_on_{name}", lambda _, seconds=seconds: seconds)
    found = racing.race({"it": lambda: None}, rounds=1, on_gpu=on_gpu)
    assert found == {"it": [{"cpu": 1.0, "gpu": 2.0}[clock]]}


def test_table_says_that_a_plan_is_preferred(
    spoilt: Path, made_up_times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune_bundle(Bundle.open(spoilt))
    plan: Any = SimpleNamespace(backend="tensorrt", plan="a plan")
    monkeypatch.setattr(tune, "auto_choice", lambda _: plan)
    text = tune.as_text(tuned, tuned.manifest.tunings[0])
    assert text.endswith(
        "There auto runs tensorrt.\nIt prefers a plan to any graph; the order above is for when no plan runs."
    )


def tuning_of(kind: str, *names: str, device: str = "it") -> Tuning:
    times = tuple(BackendTimes(backend=name, runner=name, seconds=(1.0,)) for name in names)
    return Tuning(kind=kind, device=device, versions={}, batches=(1,), backends=times, date="2026-11-30")


@pytest.mark.parametrize(
    ("tunings", "expected"),
    [
        ([], NAMED),
        (
            [("cuda", "onnxruntime-cuda", "torch-cuda")],
            ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "torch-cuda", "openvino", "onnxruntime-cpu", "torch-cpu"),
        ),
        (
            [("cuda", "onnxruntime-cuda"), ("cpu", "torch-cpu")],
            ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "torch-cuda", "torch-cpu", "openvino", "onnxruntime-cpu"),
        ),
        ([("cpu", "torch-cuda", "tensorrt", "of another trtower")], NAMED),
    ],
)
def test_plans_stay_first_and_the_cpu_last(tunings: list[tuple[str, ...]], expected: tuple[str, ...]) -> None:
    backends = [each for name in NAMED for each in BACKENDS if each.name == name]
    known = [KnownTuning(tuning=tuning_of(*each), ignored=None) for each in tunings]
    assert tuple(each.name for each in fastest_first(backends, known)) == expected
    ignored = [replace(each, ignored="it is old") for each in known]
    assert tuple(each.name for each in fastest_first(backends, ignored)) == NAMED


def test_a_gpu_is_not_looked_at_for_a_tower_on_the_cpu(
    spoilt: Path, made_up_times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To name it, torch would create a context on it."""
    tuned = change(tune_bundle(Bundle.open(spoilt)), kind="cuda", device="NVIDIA L4")
    monkeypatch.setattr(fastest, "default_device", lambda kind: pytest.fail(f"it looked at {kind}"))
    assert choose(tuned, "openvino").backend == "openvino"
    assert choose(tuned, device="cpu").backend == "openvino"
    assert choose(tuned, "torch", "cpu").backend == "torch-cpu"


def test_a_bundle_keeps_one_tuning_for_each_device(
    spoilt: Path, made_up_times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_bundle(Bundle.open(spoilt))
    made_up_times["onnxruntime-cpu"] = 0.05
    tune_bundle(Bundle.open(spoilt))
    assert choose(Bundle.open(spoilt)).backend == "onnxruntime-cpu"
    for module in (tune, fastest):
        monkeypatch.setattr(module, "describe_device", lambda _: "Another CPU, 2 threads")
    assert choose(Bundle.open(spoilt)).backend == "openvino"
    made_up_times["torch-cpu"] = 0.001
    tune_bundle(Bundle.open(spoilt))
    assert choose(Bundle.open(spoilt)).backend == "torch-cpu"
    assert [each.device for each in Bundle.open(spoilt).manifest.tunings][1:] == ["Another CPU, 2 threads"]


def test_a_backend_that_fails_is_left_out_and_said(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def race(calls: dict[str, Callable[[], None]], *, rounds: int, drop: Any, on_gpu: bool) -> dict[str, list[float]]:
        if "openvino" in calls:
            drop("openvino", RuntimeError("no memory"))
        return {name: [SECONDS[name]] for name in calls if name != "openvino"}

    monkeypatch.setattr(tune, "race", race)
    (tuning,) = tune_bundle(Bundle.open(spoilt), batches=[1, 2], on_step=lines.append).manifest.tunings
    assert "openvino is not timed, because it failed: no memory" in lines
    assert "openvino" not in {each.backend for each in tuning.backends}
    assert {len(each.seconds) for each in tuning.backends} == {2}


def test_a_backend_that_cannot_load_is_left_out_and_said(
    spoilt: Path, made_up_times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    openvino = choosing.find_backend("openvino")

    def fail(*_: object) -> None:
        raise BackendError("it could not load.")

    monkeypatch.setattr(type(openvino), "open", fail)
    tuned = tune_bundle(Bundle.open(spoilt), on_step=lines.append)
    assert "openvino is not timed: it could not load." in lines
    assert "openvino" not in {each.backend for each in tuned.manifest.tunings[0].backends}
    monkeypatch.setattr(tune, "candidates", lambda *_: [])
    with pytest.raises(BackendError, match=r"no backend ran the graph of .* on cpu, so there is nothing to compare"):
        tune_bundle(Bundle.open(spoilt))


def test_bad_requests_change_nothing(spoilt: Path) -> None:
    bundle = Bundle.open(spoilt)
    before = (spoilt / MANIFEST).read_bytes()
    with pytest.raises(ConfigError, match=r"batch 5 is not within the profiles of .*: 1 to 4"):
        tune_bundle(bundle, batches=[1, 5])
    with pytest.raises(ConfigError, match="batches is empty"):
        tune_bundle(bundle, batches=[])
    for device in ("gpu", ""):
        with pytest.raises(ConfigError, match=f"device '{device}'"):
            tune_bundle(bundle, device=device)
    with pytest.raises(BackendError, match="cannot use device cuda:0: no GPU here"):
        tune_bundle(bundle, device="cuda")
    with (spoilt / "tower.onnx.data").open("r+b") as stream:
        stream.write(b"\x7f" * 100)
    with pytest.raises(BundleError, match=r"tower\.onnx\.data was altered"):
        tune_bundle(bundle)
    assert (spoilt / MANIFEST).read_bytes() == before


def test_read_only_bundle_is_refused_before_anything_is_loaded(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr(tune, "candidates", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(
        BundleError, match=r"is read-only, and the result for .* is written there: tune a writable copy"
    ):
        tune_bundle(Bundle.open(spoilt))


def test_bundle_exported_again_meanwhile_is_left_alone(spoilt: Path, made_up_times: dict[str, float]) -> None:
    bundle = Bundle.open(spoilt)
    files = {**bundle.manifest.files, "tower.onnx": replace(bundle.manifest.files["tower.onnx"], sha256="0" * 64)}
    with pytest.raises(BundleError, match="so this tuning is out of date"):
        Bundle(spoilt, replace(bundle.manifest, files=files)).add_tuning(tuning_of("cpu", "openvino"))


def test_the_command_prints_a_table_or_json(
    spoilt: Path, made_up_times: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", str(spoilt), "--batch", "1,4", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["batch", "1", "4"]
    assert ["torch-cpu", "100.00", "100.00", "ms"] in [line.split()[:4] for line in out.splitlines()]
    assert "There auto runs torch-cpu." in out
    assert err.endswith(f"the tuning is in {spoilt / MANIFEST}\n")
    assert run(["tune", str(spoilt), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(asdict(Bundle.open(spoilt).manifest.tunings[0])))
    assert run(["tune", str(spoilt), "--batch", "one"]) == 2
    assert capsys.readouterr().err == (
        "error: --batch one: expected whole numbers separated by commas, such as 1,8,32.\n"
    )
    assert run(["tune", "nowhere"]) == 1


def test_inspect_shows_why_auto_chose(spoilt: Path, made_up_times: dict[str, float]) -> None:
    before = as_text(inspect_bundle(Bundle.open(spoilt)))
    assert f"tuning       none for this device; race its backends with: trtower tune {spoilt}" in before
    tuned = tune_bundle(Bundle.open(spoilt))
    found, text = inspect_bundle(tuned), as_text(inspect_bundle(tuned))
    assert [row.backend for row in found.backends if row.auto] == ["torch-cpu"]
    assert ", which auto follows where no plan runs\n" in text
    assert "torch-cpu 100.0 ms; onnxruntime-cpu 200.0 ms; openvino 300.0 ms; at batch 1\n" in text
    assert "race its backends" not in text
    stale = inspect_bundle(change(tuned, device="NVIDIA L4", kind="cuda"))
    assert [each.ignored for each in stale.tunings] == ["there is no such device here"]
    assert "on NVIDIA L4, ignored, because there is no such device here\n" in as_text(stale)
    assert "race its backends" in as_text(stale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tpu"}, "unknown kind of device in a tuning 'tpu'"),
        ({"batches": [1, 2]}, r"expected one above 0 for each of the batches \(1, 2\)"),
        ({"batches": [-5]}, "expected different ones"),
        ({"date": "today"}, "expected a day such as 2026-11-30"),
        (
            {"backends": [{"backend": name, "runner": name, "seconds": [s]} for name, s in (("a", 2.0), ("b", 1.0))]},
            "does not have its backends in the order of their times",
        ),
        ({"backends": []}, "timed no backend or no batch"),
        ({"backends": [{"backend": "a", "runner": "a", "seconds": [0.0]}]}, "expected one above 0"),
        ({"backends": [{"backend": "a", "runner": "a", "seconds": [1.0]}] * 2}, "has a backend twice"),
        ({"backends": [{"backend": "a", "runner": "a"}]}, "missing seconds"),
        (None, "tunings has two of the same device"),
    ],
)
def test_half_understood_tuning_is_refused(clip_bundle: Path, changes: dict[str, Any] | None, message: str) -> None:
    data = json.loads((clip_bundle / MANIFEST).read_text())
    tuning = json.loads(json.dumps(asdict(tuning_of("cpu", "a"))))
    data["tunings"] = [tuning | changes] if changes else [tuning, tuning]
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(data))
    del data["tunings"]
    assert Manifest.from_json(json.dumps(data)).tunings == ()  # bundles of an older trtower


def test_profile_of_one_batch_is_timed_at_it(spoilt: Path, made_up_times: dict[str, float]) -> None:
    bundle = Bundle.open(spoilt)
    only = Bundle(spoilt, replace(bundle.manifest, profiles=(BatchProfile(min=2, opt=2, max=2),)))
    assert tune_bundle(only).manifest.tunings[0].batches == (2,)
