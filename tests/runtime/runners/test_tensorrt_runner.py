"""What the TensorRT runner promises its callers, tested without a GPU on fakes of TensorRT and of CUDA's streams.

tests/gpu tests that real hardware behaves as the fakes do. If the real TensorRT-RTX needs no GPU to show a fact, the
fact is tested on it too.
"""

import gc
import logging
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.fake_tensorrt_without_gpu import (
    FAKE_DEVICE_MEMORY,
    FAKE_VERSION,
    FakeCuda,
    FakeGraph,
    FakeStream,
    FakeTensorRT,
    fake_answer,
    fake_plan,
)
from tests.runtime.signatures import differences
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BuildSettings, PlanEntry
from trtower.errors import BackendError, BundleError, ConfigError
from trtower.runners.base import EngineOptions
from trtower.runners.contexts import ContextSlot
from trtower.runners.runtime_cache import RuntimeCache
from trtower.runners.runtimes import plan_verdicts
from trtower.runners.tensorrt import TensorRTRunner

DEVICE = torch.device("cuda", 1)
PLAN = "plans/fake.plan"
THREADS = 8
CALLS = 10
UMASK = os.umask(0)
os.umask(UMASK)


@pytest.fixture
def tensorrt(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Replace the modules of both flavours; one records what is done with either."""
    fake = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(cuda, "tensorrt", fake))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return fake


@pytest.fixture
def bundle(spoilt: Path) -> Bundle:
    return with_plan(Bundle.open(spoilt))


@pytest.fixture
def runner(bundle: Bundle, tensorrt: FakeTensorRT) -> TensorRTRunner:
    del tensorrt
    return open_plan(bundle)


def with_plan(
    bundle: Bundle,
    content: bytes | None = None,
    flavour: str = "tensorrt-rtx",
    version: str = FAKE_VERSION,
    settings: BuildSettings | None = None,
    **options: Any,
) -> Bundle:
    """Add a fake plan to a bundle, by default one for its tensors."""
    input_, output, batch = bundle.manifest.input, bundle.manifest.output, bundle.manifest.batch
    if content is None:
        image, tokens = (input_.name, input_.shape[1:]), (output.name, output.shape[1:])
        profiles = options.pop("profiles", ((batch.min, batch.opt, batch.max),))
        content = fake_plan(image, tokens, profiles, **options)
    staged = bundle.path / "staged.plan"
    staged.write_bytes(content)
    entry = PlanEntry(
        file=PLAN,
        flavour=flavour,
        version=version,
        platform="fake",
        compute_capabilities=(),
        settings=settings or BuildSettings(),
    )
    return bundle.add_plan(entry, staged)


def open_plan(bundle: Bundle, **options: Any) -> TensorRTRunner:
    return TensorRTRunner(bundle, fake_entry(bundle), DEVICE, EngineOptions(**options))


def fake_entry(bundle: Bundle) -> PlanEntry:
    return next(plan for plan in reversed(bundle.manifest.plans) if plan.platform == "fake")


def draw_images(bundle: Bundle, batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    side = bundle.manifest.spec.image_size
    return torch.rand(batch, 3, side, side, generator=generator).half()


def empty_features(bundle: Bundle, batch: int) -> torch.Tensor:
    spec = bundle.manifest.spec
    return torch.full((batch, spec.num_tokens, spec.hidden_size), -1.0, dtype=torch.half)


def answers(bundle: Bundle, images: torch.Tensor) -> torch.Tensor:
    tokens = (bundle.manifest.spec.num_tokens, bundle.manifest.spec.hidden_size)
    return torch.from_numpy(np.stack([fake_answer(image, tokens) for image in images.numpy()]))


def test_fake_has_only_names_and_parameters_of_the_real_module(tensorrt: FakeTensorRT) -> None:
    """The real modules of other products and versions are in other environments: see tests/tensorrt."""
    assert not [*differences(tensorrt, pytest.importorskip("tensorrt_rtx_bindings").tensorrt_rtx)]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_result_of_each_image_lands_in_its_own_row(
    bundle: Bundle, runner: TensorRTRunner, cuda: FakeCuda, batch: int
) -> None:
    images, around = draw_images(bundle, batch), empty_features(bundle, batch + 2)
    runner.run(images, around[1:-1])
    cuda.synchronize()
    assert torch.equal(around[1:-1], answers(bundle, images))
    assert (around[[0, -1]] == -1).all()


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_name_has_flavour_version_and_gpu(bundle: Bundle, flavour: str) -> None:
    runner_bundle = with_plan(Bundle.open(bundle.path), flavour=flavour)
    runner = TensorRTRunner(runner_bundle, runner_bundle.manifest.plans[-1], DEVICE, EngineOptions())
    assert runner.name == f"{flavour} {FAKE_VERSION}, sm89"
    assert runner.files == (runner_bundle.manifest.plans[-1].file,)
    assert (runner.device, runner.dtype) == (DEVICE, torch.half)


def test_engine_is_made_and_run_on_the_requested_device(
    bundle: Bundle, runner: TensorRTRunner, tensorrt: FakeTensorRT
) -> None:
    runner.run(draw_images(bundle, 1), empty_features(bundle, 1))
    assert tensorrt._fake_devices == [DEVICE] * 3  # deserialize, create a context, execute


@pytest.mark.usefixtures("tensorrt")
def test_plan_with_other_tensors_than_the_manifest_is_refused(bundle: Bundle) -> None:
    input_, output, batch = bundle.manifest.input, bundle.manifest.output, bundle.manifest.batch
    image, tokens = (input_.name, input_.shape[1:]), (output.name, output.shape[1:])
    wide = (output.name, (output.shape[1], 2 * int(output.shape[2])))
    for content, message in (
        (fake_plan(image, wide, ((batch.min, 2, batch.max),)), r"has \[\('hidden_states', \('batch', 10, 128\)\)\]"),
        (fake_plan(image, tokens, ((batch.min, 2, batch.max + 1),)), "accepts 1 to 5 images; tower.json says 1 to 4"),
    ):
        with pytest.raises(BundleError, match=message):
            open_plan(with_plan(bundle, content=content))


@pytest.mark.usefixtures("tensorrt")
def test_plan_that_tensorrt_refuses_is_named_with_the_next_step(bundle: Bundle) -> None:
    refused = with_plan(bundle, content=b"garbage")
    with pytest.raises(
        BackendError, match=rf"{FAKE_VERSION} could not load .*fake\..*plan.*trtower build {bundle.path}"
    ):
        open_plan(refused)


@pytest.mark.usefixtures("cuda")
def test_real_tensorrt_rtx_says_why_it_refuses(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    version = pytest.importorskip("tensorrt_rtx").__version__
    with pytest.raises(BackendError, match="readHeader"):
        open_plan(with_plan(bundle, content=b"garbage", version=version))
    assert any(r.levelno == logging.ERROR and "readHeader" in r.getMessage() for r in log_of_runner(caplog))


COMPATIBLE = BuildSettings(version_compatible=True)


@pytest.fixture
def lean(cuda: FakeCuda, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(cuda, "tensorrt_lean", tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt_lean", fake)
    return fake


@pytest.mark.parametrize("full", ["missing", "broken", "of another version"])
def test_version_compatible_plan_runs_on_the_lean_runtime(
    bundle: Bundle, cuda: FakeCuda, lean: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    if full == "of another version":
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "100.0.fake")
    else:
        monkeypatch.setitem(sys.modules, "tensorrt", None if full == "missing" else ModuleType("tensorrt"))
    runner = open_plan(with_plan(bundle, flavour="tensorrt", settings=COMPATIBLE))
    assert (runner.backend, runner.name) == ("tensorrt", f"tensorrt-lean {FAKE_VERSION}, sm89")
    images, features = draw_images(bundle, 2), empty_features(bundle, 2)
    runner.run(images, features)
    cuda.synchronize()
    assert torch.equal(features, answers(bundle, images))


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize("settings", [BuildSettings(), COMPATIBLE])
def test_full_tensorrt_runs_a_plan_if_both_can(bundle: Bundle, settings: BuildSettings) -> None:
    assert open_plan(with_plan(bundle, flavour="tensorrt", settings=settings)).name == f"tensorrt {FAKE_VERSION}, sm89"


@pytest.mark.parametrize(
    ("settings", "full", "lean_version", "says"),
    [
        (
            BuildSettings(),
            None,
            FAKE_VERSION,
            "needs the package tensorrt, .* tensorrt-lean runs only plans that were built with --v",
        ),
        (BuildSettings(), "1.0", FAKE_VERSION, "but this machine has tensorrt 1.0: pip install tensorrt==99"),
        (
            COMPATIBLE,
            "1.0",
            "2.0",
            "but this machine has tensorrt 1.0 and tensorrt-lean 2.0: pip install tensorrt-lean==99",
        ),
        (COMPATIBLE, None, "2.0", "but this machine has tensorrt-lean 2.0: pip install tensorrt-lean==99"),
        (COMPATIBLE, None, None, "the lean runtime of TensorRT needs the package tensorrt_lean, .*trt-lean"),
    ],
)
@pytest.mark.usefixtures("tensorrt")
def test_plan_that_no_installed_runtime_loads_says_why(
    bundle: Bundle,
    lean: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    settings: BuildSettings,
    full: str | None,
    lean_version: str | None,
    says: str,
) -> None:
    for name, version in (("tensorrt", full), ("tensorrt_lean", lean_version)):
        if version is None:
            monkeypatch.setitem(sys.modules, name, None)
        else:
            monkeypatch.setattr(sys.modules[name], "__version__", version)
    plan = fake_entry(with_plan(bundle, flavour="tensorrt", settings=settings))
    verdicts = plan_verdicts(plan, DEVICE)
    assert re.search(says, f"{verdicts['flavour']} {verdicts['version']}")
    assert verdicts["version"]


@pytest.mark.parametrize("failure", ["null", "crash"])
def test_driver_that_is_too_old_is_an_error_and_ends_no_process(
    bundle: Bundle, tensorrt: FakeTensorRT, failure: str
) -> None:
    """The lean runtime returns an object that even destroying would crash on: it has to outlive everything."""
    tensorrt._fake_driver_is_old = failure
    with pytest.raises(
        BackendError, match=r"could not start on cuda:1; its driver may be too old: .*(error: 35|nullptr)"
    ):
        open_plan(bundle)
    gc.collect()
    assert not tensorrt._fake_destroyed


@pytest.mark.usefixtures("tensorrt")
def test_context_without_memory_says_how_much_it_needs(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=rf"could not create an execution context on cuda:1.* {FAKE_DEVICE_MEMORY} "):
        open_plan(with_plan(bundle, contexts=0))


@pytest.mark.usefixtures("tensorrt")
def test_runtime_that_cannot_start_is_a_backend_error(
    bundle: Bundle, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")  # as in NVIDIA/TensorRT#635

    monkeypatch.setattr(tensorrt, "Runtime", fail)
    with pytest.raises(BackendError):
        open_plan(bundle)


def test_failed_enqueue_is_an_error_and_the_next_call_works(
    bundle: Bundle, runner: TensorRTRunner, tensorrt: FakeTensorRT, cuda: FakeCuda
) -> None:
    images, features = draw_images(bundle, 2), empty_features(bundle, 2)
    tensorrt._fake_enqueue_fails = True
    with pytest.raises(BackendError, match=r"could not run a batch of \(2, 3, 42, 42\)"):
        runner.run(images, features)
    tensorrt._fake_enqueue_fails = False
    runner.run(images, features)
    cuda.synchronize()
    assert torch.equal(features, answers(bundle, images))


def test_batch_outside_the_profile_is_an_error(bundle: Bundle, runner: TensorRTRunner) -> None:
    too_many = bundle.manifest.batch.max + 1
    with pytest.raises(BackendError):
        runner.run(draw_images(bundle, too_many), empty_features(bundle, too_many))


def test_eight_threads_get_the_results_of_one(bundle: Bundle, runner: TensorRTRunner, cuda: FakeCuda) -> None:
    def serve(thread: int) -> None:
        stream = cuda.new_stream()
        with cuda.stream(stream):
            for call in range(CALLS):
                images = draw_images(bundle, 1 + (thread + call) % 4, seed=THREADS * call + thread)
                features = empty_features(bundle, len(images))
                runner.run(images, features)
                stream.synchronize()
                assert torch.equal(features, answers(bundle, images))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(serve, range(THREADS)))
    assert len(cuda.finished) == THREADS * CALLS


def test_call_only_queues_work_after_what_is_in_the_stream(
    bundle: Bundle, runner: TensorRTRunner, cuda: FakeCuda
) -> None:
    images, features, stream = draw_images(bundle, 1), empty_features(bundle, 1), cuda.new_stream()
    late = draw_images(bundle, 1, seed=1)
    with cuda.stream(stream):
        stream.submit(lambda: images.copy_(late))
        runner.run(images, features)
    assert (features == -1).all()
    stream.synchronize()
    assert torch.equal(features, answers(bundle, late))


def test_default_stream_runs_no_engine_but_waits_for_the_result(
    bundle: Bundle, runner: TensorRTRunner, cuda: FakeCuda
) -> None:
    images, features = draw_images(bundle, 1), empty_features(bundle, 1)
    default = cuda.current_stream()
    runner.run(images, features)
    default.synchronize()
    assert torch.equal(features, answers(bundle, images))
    assert default not in cuda.finished


def test_call_reads_images_after_earlier_work_in_the_default_stream(
    bundle: Bundle, runner: TensorRTRunner, cuda: FakeCuda
) -> None:
    images, features, late = draw_images(bundle, 1), empty_features(bundle, 1), draw_images(bundle, 1, seed=1)
    default = cuda.current_stream()
    default.submit(lambda: images.copy_(late))
    runner.run(images, features)
    default.synchronize()
    assert torch.equal(features, answers(bundle, late))


@pytest.mark.usefixtures("tensorrt")
def test_unaligned_tensors_are_copied(
    bundle: Bundle, runner: TensorRTRunner, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtower.runners.tensorrt.ALIGNMENT", 1 << 62)
    images, features = draw_images(bundle, 2), empty_features(bundle, 2)
    addresses: list[int] = []
    monkeypatch.setattr(
        ContextSlot,
        "enqueue",
        lambda _, inputs, outputs, *__: addresses.extend((inputs.data_ptr(), outputs.data_ptr())),
    )
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)
    runner.run(images, features)
    assert not {images.data_ptr(), features.data_ptr()} & set(addresses)
    assert (features == 1).all()


def run_in(streams: list[FakeStream], runner: TensorRTRunner, bundle: Bundle, cuda: FakeCuda) -> None:
    images, features = draw_images(bundle, 1), empty_features(bundle, 1)
    for stream in streams:
        with cuda.stream(stream):
            runner.run(images, features)


@pytest.mark.usefixtures("tensorrt")
def test_second_stream_waits_for_the_first_if_they_share_memory(bundle: Bundle, cuda: FakeCuda) -> None:
    first, second = cuda.new_stream(), cuda.new_stream()
    run_in([first, second], open_plan(bundle, contexts=1), bundle, cuda)
    second.synchronize()
    assert cuda.finished == [first, second]


@pytest.mark.usefixtures("tensorrt")
def test_first_call_waits_for_the_stream_that_allocated_the_slots_memory(bundle: Bundle, cuda: FakeCuda) -> None:
    maker, first, done = cuda.current_stream(), cuda.new_stream(), list[str]()
    maker.submit(lambda: done.append("the last user of the memory is done"))
    run_in([first], open_plan(bundle, contexts=1), bundle, cuda)
    first.synchronize()
    assert done


def test_next_call_waits_for_the_queued_work_of_a_failed_one(
    bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT
) -> None:
    runner, first, second, queued = open_plan(bundle, contexts=1), cuda.new_stream(), cuda.new_stream(), list[str]()
    tensorrt._fake_enqueue_fails = True
    with cuda.stream(first), pytest.raises(BackendError):
        runner.run(
            draw_images(bundle, 1),
            empty_features(bundle, 1),
            lambda stream: stream.submit(lambda: queued.append("before it failed")),
        )
    tensorrt._fake_enqueue_fails = False
    run_in([second], runner, bundle, cuda)
    second.synchronize()
    assert queued


def test_every_stream_gets_its_own_memory_up_to_the_limit(
    bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT
) -> None:
    first, second, third = (cuda.new_stream() for _ in range(3))
    runner = open_plan(bundle, contexts=2)
    run_in([first, second, first, second, second], runner, bundle, cuda)
    assert len(tensorrt._fake_contexts) == 2
    second.synchronize()
    assert cuda.finished == [second] * 3  # it waited for no other stream
    run_in([third], runner, bundle, cuda)
    assert len(tensorrt._fake_contexts) == 2
    third.synchronize()
    assert cuda.finished == [second] * 3 + [first] * 2 + [third]  # the slot that was idle for longest


@pytest.mark.usefixtures("tensorrt")
def test_slot_without_room_for_every_profile_is_not_made(
    bundle: Bundle, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    runner = open_plan(with_plan(bundle, profiles=((1, 1, 1), (2, 2, 4)), contexts=3))
    first, second = cuda.new_stream(), cuda.new_stream()
    for stream, batch in ((first, 1), (first, 2), (second, 1), (second, 2), (second, 2)):
        images, features = draw_images(bundle, batch), empty_features(bundle, batch)
        with cuda.stream(stream):
            runner.run(images, features)
        stream.synchronize()
        assert torch.equal(features, answers(bundle, images))
    assert "concurrency stays at its current level" in caplog.text


def test_runner_continues_with_the_contexts_that_fit(
    bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    runner = open_plan(with_plan(bundle, contexts=1), contexts=4)
    streams = [cuda.new_stream() for _ in range(3)]
    run_in(streams, runner, bundle, cuda)
    assert len(tensorrt._fake_contexts) == 1
    assert len([r for r in caplog.records if "concurrency stays at its current level" in r.getMessage()]) == 1
    streams[-1].synchronize()
    assert cuda.finished == streams


def test_scratch_that_does_not_fit_is_an_error_only_for_the_first_slot(
    bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_plan(bundle)

    def fail(size: int, device: torch.device) -> None:
        raise torch.OutOfMemoryError(f"{size} bytes on {device}")

    monkeypatch.setattr("trtower.runners.contexts.allocate", fail)
    run_in([cuda.new_stream(), cuda.new_stream()], runner, bundle, cuda)
    assert len(tensorrt._fake_contexts) == 1
    with pytest.raises(BackendError, match=rf"no room for an execution context on cuda:1.*{FAKE_DEVICE_MEMORY} bytes"):
        open_plan(bundle)


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (2, 1), (3, 2), (4, 2)])
def test_call_uses_the_profile_tuned_nearest(
    bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT, batch: int, profile: int
) -> None:
    runner = open_plan(with_plan(bundle, profiles=((1, 1, 1), (1, 2, 4), (2, 4, 4))))
    images, features = draw_images(bundle, batch), empty_features(bundle, batch)
    for _ in range(2):
        runner.run(images, features)
    cuda.synchronize()
    assert torch.equal(features, answers(bundle, images))
    contexts = {id(context) for context, *_ in tensorrt._fake_ran}
    assert [ran[1:] for ran in tensorrt._fake_ran] == [(profile, batch)] * 2
    assert len(contexts) == 1


@pytest.mark.usefixtures("tensorrt")
def test_batch_in_a_gap_between_profiles_is_refused(bundle: Bundle) -> None:
    runner = open_plan(with_plan(bundle, profiles=((1, 1, 1), (3, 4, 4))))
    with pytest.raises(BackendError, match="no profile of the plan accepts 2 images"):
        runner.run(draw_images(bundle, 2), empty_features(bundle, 2))


def captured(bundle: Bundle, **options: Any) -> TensorRTRunner:
    """Open a plan of the flavour whose graphs trtower captures; TensorRT-RTX captures its own."""
    with_tensorrt = with_plan(bundle, flavour="tensorrt")
    return open_plan(with_tensorrt, **options)


def test_graph_serves_its_batch_at_any_addresses(bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT) -> None:
    runner = captured(bundle)
    with cuda.stream(cuda.new_stream()):
        for seed in range(4):
            images, features = draw_images(bundle, 2, seed), empty_features(bundle, 2)
            runner.run(images, features)
            assert torch.equal(features, answers(bundle, images))
    (graph,) = cuda.graphs
    assert graph.replays == 4
    assert {batch for _, _, batch in tensorrt._fake_ran} == {2}


def test_batches_that_no_profile_names_run_without_graphs(
    bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT
) -> None:
    runner = captured(bundle)  # its profile is 1 2 4
    for batch in (3, 1, 3, 4, 2, 1, 3):
        images, features = draw_images(bundle, batch), empty_features(bundle, batch)
        runner.run(images, features)
        cuda.synchronize()
        assert torch.equal(features, answers(bundle, images))
    assert [graph.replays for graph in cuda.graphs] == [2, 1, 1]
    by_batch: dict[int, set[int]] = {}
    for context, _, batch in tensorrt._fake_ran:
        by_batch.setdefault(batch, set()).add(id(context))
    assert len(set.union(*by_batch.values())) == 4  # no other call changes what a graph captured


@pytest.mark.usefixtures("tensorrt")
def test_failed_capture_is_logged_once_and_calls_run_without_graphs(
    bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeGraph, "fails", True)
    runner = captured(bundle)
    for batch in (1, 2, 1):
        images, features = draw_images(bundle, batch), empty_features(bundle, batch)
        runner.run(images, features)
        cuda.synchronize()
        assert torch.equal(features, answers(bundle, images))
    run_in([cuda.new_stream(), cuda.new_stream()], runner, bundle, cuda)
    assert len(cuda.graphs) == 1  # in whichever slot
    (warning,) = [r.getMessage() for r in caplog.records if "CUDA graphs are off" in r.getMessage()]
    assert "legacy stream" in warning


@pytest.mark.usefixtures("tensorrt")
def test_captured_graph_is_still_replayed_after_another_capture_failed(
    bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, stream = captured(bundle), cuda.new_stream()
    with cuda.stream(stream):
        runner.run(draw_images(bundle, 1), empty_features(bundle, 1))
        monkeypatch.setattr(FakeGraph, "fails", True)
        for batch in (2, 1):
            images, features = draw_images(bundle, batch), empty_features(bundle, batch)
            runner.run(images, features)
            stream.synchronize()
            assert torch.equal(features, answers(bundle, images))
    assert [graph.replays for graph in cuda.graphs] == [2, 0]


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("first", [True, False])
def test_graph_serves_calls_inside_and_outside_inference_mode(bundle: Bundle, cuda: FakeCuda, *, first: bool) -> None:
    runner = captured(bundle)
    for mode in (first, not first):
        with torch.inference_mode(mode):
            images, features = draw_images(bundle, 2), empty_features(bundle, 2)
            runner.run(images, features)
            cuda.synchronize()
            assert torch.equal(features, answers(bundle, images))
    assert [graph.replays for graph in cuda.graphs] == [2]


@pytest.mark.usefixtures("tensorrt")
def test_capture_keeps_its_place_among_the_work_of_the_stream(bundle: Bundle, cuda: FakeCuda) -> None:
    """It runs after earlier work, whose memory it may use, and before later work."""
    order, stream, runner = list[str](), cuda.new_stream(), captured(bundle)
    (slot,) = runner._slots._idle
    private: Any = slot._private
    with cuda.stream(stream):
        stream.submit(lambda: order.append("before"))
        images, features = draw_images(bundle, 2), empty_features(bundle, 2)
        graph = slot._capture_graph(images, features, stream)
        private_work = list(private._work)
    assert private_work
    private.synchronize()
    assert order == ["before"]
    private.submit(lambda: order.append("the capture's last"))
    stream.wait_stream(private)
    stream.synchronize()
    assert order == ["before", "the capture's last"]
    assert graph._outputs.data_ptr() != features.data_ptr()


@pytest.mark.usefixtures("tensorrt")
def test_no_thread_captures_after_a_capture_failed(
    bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "lasts_s", 0.02)
    monkeypatch.setattr(FakeGraph, "fails", True)
    runner, start = captured(bundle), threading.Barrier(4)

    def serve(_: int) -> None:
        with cuda.stream(cuda.new_stream()):
            start.wait()
            images, features = draw_images(bundle, 2), empty_features(bundle, 2)
            runner.run(images, features)
            cuda.current_stream().synchronize()
            assert torch.equal(features, answers(bundle, images))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(serve, range(4)))
    assert len(cuda.graphs) == 1


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("own", [True, False])
def test_threads_that_share_a_stream_do_not_capture_each_others_work(
    bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, *, own: bool
) -> None:
    """In torch's default stream, whose calls share the runner's own stream, and in a stream that callers share."""
    monkeypatch.setattr(FakeGraph, "lasts_s", 0.02)
    runner, stream = captured(bundle), cuda.new_stream() if own else cuda.current_stream()
    start = threading.Barrier(THREADS)

    def serve(thread: int) -> None:
        images, features = draw_images(bundle, 2, thread), empty_features(bundle, 2)
        with cuda.stream(stream):
            start.wait()
            time.sleep(thread / 200)
            for _ in range(3):
                runner.run(images, features)
            stream.synchronize()
        assert torch.equal(features, answers(bundle, images))

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(serve, range(THREADS)))
    assert 1 <= len(cuda.graphs) <= 4  # one per slot


@pytest.mark.usefixtures("tensorrt")
def test_graphs_can_be_turned_off(bundle: Bundle, cuda: FakeCuda) -> None:
    runner = captured(bundle, cuda_graphs=False)
    run_in([cuda.new_stream()], runner, bundle, cuda)
    assert not cuda.graphs


@pytest.mark.parametrize(
    ("options", "graphs", "kernels"),
    [
        ({}, "WHOLE_GRAPH_CAPTURE", "LAZY"),
        ({"cuda_graphs": False, "kernel_specialization": "eager"}, "DISABLED", "EAGER"),
        ({"kernel_specialization": "none"}, "WHOLE_GRAPH_CAPTURE", "NONE"),
    ],
)
def test_options_of_tensorrt_rtx_reach_its_runtime_config(
    bundle: Bundle, cuda: FakeCuda, tensorrt: FakeTensorRT, options: dict[str, Any], graphs: str, kernels: str
) -> None:
    run_in([cuda.new_stream()], open_plan(bundle, **options), bundle, cuda)
    (config,) = tensorrt._fake_configs
    assert config.cuda_graph_strategy.name == graphs
    assert config.dynamic_shapes_kernel_specialization_strategy.name == kernels
    assert not cuda.graphs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": 0}, "contexts must be at least 1; got 0"),
        ({"kernel_specialization": "always"}, "unknown kernel_specialization 'always'; choose lazy, eager or none"),
    ],
)
def test_invalid_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


def test_close_waits_for_the_gpu_and_refuses_the_next_call(
    bundle: Bundle, runner: TensorRTRunner, cuda: FakeCuda
) -> None:
    images, features = draw_images(bundle, 1), empty_features(bundle, 1)
    with cuda.stream(cuda.new_stream()):
        runner.run(images, features)
        runner.close()
        assert torch.equal(features, answers(bundle, images))
        with pytest.raises(BackendError, match="closed"):
            runner.run(images, features)


def stripped(bundle: Bundle) -> Bundle:
    whole = with_plan(bundle)
    plans = (*whole.manifest.plans[:-1], replace(whole.manifest.plans[-1], settings=BuildSettings(stripped=True)))
    return Bundle(whole.path, replace(whole.manifest, plans=plans))


def test_plan_without_weights_gets_those_of_the_graph(bundle: Bundle, tensorrt: FakeTensorRT) -> None:
    open_plan(bundle)
    assert not tensorrt._fake_refitted
    open_plan(stripped(bundle))
    assert tensorrt._fake_refitted == [str(bundle.path / "tower.onnx")]


def test_plan_that_rejects_weights_names_the_next_step(bundle: Bundle, tensorrt: FakeTensorRT) -> None:
    tensorrt._fake_refits = False
    with pytest.raises(BackendError, match=r"without its weights.*: fake refusal 0 of weights\. Build it with weights"):
        open_plan(stripped(bundle))


@pytest.mark.usefixtures("tensorrt")
def test_altered_weights_are_not_loaded_into_a_plan(bundle: Bundle) -> None:
    weights = bundle.path / "tower.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match=r"tower\.onnx\.data was altered"):
        open_plan(stripped(bundle))


def kept(bundle: Bundle) -> list[Path]:
    return sorted((bundle.path.parent / f".{bundle.path.name}.runtime-cache").glob("*"))


def test_kernels_that_one_process_compiled_reach_the_next(bundle: Bundle, tensorrt: FakeTensorRT) -> None:
    open_plan(bundle).close()
    (path,) = kept(bundle)
    assert path.read_bytes() == b"fake driver 1 compiled here"
    open_plan(bundle).close()
    assert kept(bundle) == [path]
    assert tensorrt._fake_configs[-1]._fake_cache._fake_kernels == path.read_bytes()


@pytest.mark.parametrize("fault", ["truncated", "altered", "another version", "another driver"])
def test_unusable_kernels_are_discarded_with_a_warning(
    bundle: Bundle, tensorrt: FakeTensorRT, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    open_plan(bundle).close()
    (path,) = kept(bundle)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif fault == "altered":
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    elif fault == "another version":
        path.rename(path.with_name(path.name.replace(FAKE_VERSION, "98.0")))
    else:
        tensorrt._fake_driver = b"fake driver 2"
    open_plan(bundle).close()
    assert "is discarded, and its kernels are compiled again: " in caplog.text
    (now,) = kept(bundle)
    assert now.read_bytes() == tensorrt._fake_driver + b" compiled here"


def test_kernels_of_another_gpu_are_kept(bundle: Bundle, tensorrt: FakeTensorRT) -> None:
    del tensorrt
    open_plan(bundle).close()
    (path,) = kept(bundle)
    other = path.rename(path.with_name(path.name.replace("sm89", "sm120")))
    open_plan(bundle).close()
    assert kept(bundle) == sorted([path, other])


@pytest.mark.usefixtures("tensorrt")
def test_runner_works_if_kernels_cannot_be_saved(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    (bundle.path.parent / f".{bundle.path.name}.runtime-cache").write_text("in the way")
    open_plan(bundle).close()
    assert "compiled kernels are not saved for the next process" in caplog.text


def test_rejected_runtime_cache_is_logged(
    bundle: Bundle, tensorrt: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt._fake_takes_cache = False
    open_plan(bundle).close()
    assert "rejected the runtime cache: every process compiles its own kernels" in caplog.text
    assert not kept(bundle)


@pytest.mark.usefixtures("tensorrt")
def test_kernels_are_not_saved_if_the_option_is_off(bundle: Bundle) -> None:
    open_plan(bundle, runtime_cache=False).close()
    assert not kept(bundle)


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize(
    ("severity", "levels"),
    [
        ("INTERNAL_ERROR", [logging.ERROR]),
        ("ERROR", [logging.ERROR]),
        ("WARNING", [logging.WARNING]),
        ("INFO", [logging.DEBUG]),
        ("VERBOSE", []),
    ],
)
def test_tensorrt_log_reaches_python_logging_at_its_level(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, severity: str, levels: list[int]
) -> None:
    with caplog.at_level(1, logger=TensorRTRunner.__module__):
        open_plan(with_plan(bundle, says=(severity,)))
    assert [(r.levelno, r.getMessage()) for r in log_of_runner(caplog)] == [
        (level, f"fake line at {severity}") for level in levels
    ]


def log_of_runner(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == TensorRTRunner.__module__]


def test_altered_plan_never_reaches_tensorrt(bundle: Bundle, tensorrt: FakeTensorRT) -> None:
    plan = bundle.path / fake_entry(bundle).file
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match="plan was altered"):
        open_plan(bundle)
    assert tensorrt._fake_deserialized == []


@pytest.mark.usefixtures("tensorrt")
def test_unreadable_cache_is_logged_but_a_vanished_one_is_not(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_plan(bundle).close()
    (path,) = kept(bundle)
    assert path.stat().st_mode & 0o444 == 0o444 & ~UMASK
    path.rename(path.with_name("gone"))
    path.symlink_to("nowhere")  # as if another process removed it between listing and reading
    open_plan(bundle)
    assert "is discarded" not in caplog.text

    def deny(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    with caplog.at_level(logging.WARNING):
        RuntimeCache(bundle.path, path.name[:16], FAKE_VERSION, "sm89").read_into(None)
    assert "it cannot be read: Permission denied" in caplog.text


def test_engine_is_freed_if_tensorrt_returns_no_cache(
    bundle: Bundle, tensorrt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = open_plan(bundle)
    monkeypatch.setattr(type(tensorrt._fake_configs[-1]._fake_cache), "serialize", lambda _: None)
    runner.close()
    assert "compiled kernels are not saved for the next process: TensorRT-RTX returned none" in caplog.text
    assert runner._engine is None
    runner.keep()


@pytest.mark.usefixtures("tensorrt")
def test_slot_that_fails_to_close_does_not_keep_others_open(
    bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, closed = open_plan(bundle, contexts=2), list[ContextSlot]()
    run_in([cuda.new_stream(), cuda.new_stream()], runner, bundle, cuda)

    def fail(slot: ContextSlot) -> None:
        closed.append(slot)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ContextSlot, "close", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.close()
    assert len(closed) == 2
    assert runner._engine is None
