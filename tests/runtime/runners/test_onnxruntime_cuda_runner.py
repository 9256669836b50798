"""What the runner of ONNX Runtime on CUDA promises its callers, tested on fakes of a session and of CUDA.

A fake session does not compute a tower: it fills the tokens of an image with its pixels, as the fake TensorRT does.
"""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.runtime.fake_tensorrt_without_gpu import FakeCuda, fake_answer
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH
from trtower.errors import BackendError
from trtower.runners.onnxruntime import LAUNCH, OnnxRuntimeCudaRunner

DEVICE = torch.device("cuda", 1)


class FakeRunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value


class FakeBinding:
    """Records the address and shape of each bound tensor."""

    def __init__(self) -> None:
        self.bound: list[tuple[int, tuple[int, ...]]] = []

    def bind_input(self, name: str, kind: str, index: int, element: int, shape: tuple[int, ...], address: int) -> None:
        assert (kind, index, element) == ("cuda", 1, 10), name
        self.bound.append((address, shape))

    bind_output = bind_input


class FakeCudaSession:
    """Runs in the stream that it was made with; a graph only serves the addresses and shapes of its first run."""

    cuda: FakeCuda
    rest: tuple[Any, ...]
    cannot_capture = False
    capture_fails = False
    placement = (("CUDAExecutionProvider", ["MatMul", "Attention"]), ("CPUExecutionProvider", ["Concat"]))

    def __init__(self, graph: bytes, options: object, providers: list[tuple[str, dict[str, str]]]) -> None:
        del options
        ((self.provider, self.settings),) = providers
        if self.cannot_capture and self.settings.get("enable_cuda_graph") == "1":
            raise RuntimeError("not all nodes have been partitioned\nto the CUDA EP")
        real = REAL_SESSION(graph, *FakeCudaSession.rest)
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs
        self.runs: list[int] = []
        self.threads: set[int] = set()
        self.spoilt = False
        self.graphs: dict[int, list[tuple[int, tuple[int, ...]]]] = {}

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(ep_name=provider, get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=k) for k in kinds])
            for provider, kinds in self.placement
        ]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: FakeRunOptions) -> None:
        assert options.entries["disable_synchronize_execution_providers"] == "1", "the host would wait for the GPU"
        graph = int(options.entries["gpu_graph_id"])
        assert self.cuda.current_device() == DEVICE
        self.threads.add(threading.get_ident())
        assert not self.spoilt, "the stream is stuck in a capture that failed"
        if graph != LAUNCH and self.capture_fails:
            self.spoilt = True
            raise RuntimeError("operation not permitted when stream is capturing")
        if graph != LAUNCH:
            assert self.graphs.setdefault(graph, binding.bound) == binding.bound, "a graph only serves what it captured"
        self.runs.append(graph)
        (source, shape), (target, output_shape) = binding.bound

        def work() -> None:
            for row, image in zip(memory(target, output_shape), memory(source, shape), strict=True):
                row[:] = fake_answer(image, output_shape[1:])

        stream = self.cuda.find_stream(int(self.settings["user_compute_stream"]))
        stream.submit(work)
        if graph != LAUNCH:
            stream.synchronize()  # torch copies the result out of the graph's memory, and in the fake at once


def memory(address: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    cells = (ctypes.c_uint16 * int(np.prod(shape))).from_address(address)
    return np.ctypeslib.as_array(cells).reshape(shape)


REAL_SESSION = onnxruntime.InferenceSession


@pytest.fixture
def bundle(clip_bundle: Path) -> Bundle:
    return Bundle.open(clip_bundle)


@pytest.fixture
def session(bundle: Bundle, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> type[FakeCudaSession]:
    options = onnxruntime.SessionOptions()
    weights = bundle.map("tower.onnx.data")
    options.add_external_initializers_from_files_in_memory(["tower.onnx.data"], [weights], [len(weights)])
    monkeypatch.setattr(FakeCudaSession, "cuda", cuda, raising=False)
    # The options hold only the address of the weights, and every session is made with them, so keep the weights alive.
    monkeypatch.setattr(FakeCudaSession, "weights", weights, raising=False)
    monkeypatch.setattr(FakeCudaSession, "rest", (options,), raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeCudaSession)
    monkeypatch.setattr(onnxruntime, "RunOptions", FakeRunOptions)
    return FakeCudaSession


def open_runner(bundle: Bundle, *, cuda_graphs: bool = True) -> OnnxRuntimeCudaRunner:
    return OnnxRuntimeCudaRunner(bundle, FUSED_GRAPH, DEVICE, cuda_graphs=cuda_graphs)


def run(runner: OnnxRuntimeCudaRunner, bundle: Bundle, cuda: FakeCuda, batch: int, seed: int = 0) -> None:
    """Run one batch in a new stream, and check the result."""
    spec = bundle.manifest.spec
    images = torch.rand(batch, 3, 42, 42, generator=torch.Generator().manual_seed(seed)).half()
    features = torch.full((batch, spec.num_tokens, spec.hidden_size), -1.0, dtype=torch.half)
    stream = cuda.new_stream()
    with cuda.stream(stream):
        runner.run(images, features)
    stream.synchronize()
    tokens = (spec.num_tokens, spec.hidden_size)
    assert torch.equal(features, torch.from_numpy(np.stack([fake_answer(image, tokens) for image in images.numpy()])))


def test_part_that_would_run_on_the_cpu_is_refused(
    bundle: Bundle, session: type[FakeCudaSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [("CPUExecutionProvider", ["Attention", "Concat"]), ("CPUExecutionProvider", ["Attention"])]
    monkeypatch.setattr(session, "placement", (("CUDAExecutionProvider", ["MatMul"]), *left))
    with pytest.raises(BackendError, match="no CUDA kernels for 2 Attention of this graph"):
        open_runner(bundle)


def test_version_that_cannot_report_what_runs_where_is_refused(
    bundle: Bundle, session: type[FakeCudaSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(session, "get_provider_graph_assignment_info")
    with pytest.raises(BackendError, match="is too old to report which operators it runs on the GPU"):
        open_runner(bundle)


@pytest.mark.usefixtures("session")
def test_result_arrives_in_the_callers_stream_and_the_host_does_not_wait(bundle: Bundle, cuda: FakeCuda) -> None:
    runner = open_runner(bundle, cuda_graphs=False)
    for seed in range(3):
        run(runner, bundle, cuda, batch=1 + seed, seed=seed)
    assert runner._session.runs == [LAUNCH] * 3
    assert runner._session.settings["device_id"] == "1"
    assert runner._session.settings["use_tf32"] == "0"
    assert runner._session.settings["arena_extend_strategy"] == "kSameAsRequested"
    assert "enable_cuda_graph" not in runner._session.settings or runner._session.settings["enable_cuda_graph"] == "0"


@pytest.mark.usefixtures("session")
def test_batches_of_the_profile_are_replayed_and_others_launched(bundle: Bundle, cuda: FakeCuda) -> None:
    runner = open_runner(bundle)  # its profile is 1 2 4
    for seed, batch in enumerate((1, 3, 2, 1, 4, 3, 2)):
        run(runner, bundle, cuda, batch, seed)
    assert runner._session.runs == [1, LAUNCH, 2, 1, 4, LAUNCH, 2]


def test_failed_capture_is_logged_once_and_calls_run_without_graphs(
    bundle: Bundle, cuda: FakeCuda, session: type[FakeCudaSession], caplog: pytest.LogCaptureFixture
) -> None:
    session.capture_fails = True
    try:
        runner = open_runner(bundle)
        for batch in (1, 2, 1):
            run(runner, bundle, cuda, batch)
    finally:
        session.capture_fails = False
    assert runner._session.runs == [LAUNCH] * 3
    (warning,) = [r.getMessage() for r in caplog.records if "CUDA graphs are off" in r.getMessage()]
    assert "stream is capturing" in warning


def test_session_that_rejects_graphs_is_opened_without_them(
    bundle: Bundle, cuda: FakeCuda, session: type[FakeCudaSession], caplog: pytest.LogCaptureFixture
) -> None:
    session.cannot_capture = True
    try:
        runner = open_runner(bundle)
        run(runner, bundle, cuda, 1)
    finally:
        session.cannot_capture = False
    assert runner._session.runs == [LAUNCH]
    assert "not all nodes have been partitioned to the CUDA EP" in caplog.text


@pytest.mark.usefixtures("session")
def test_provider_that_is_dropped_is_an_error_with_or_without_graphs(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCudaSession, "get_providers", lambda _: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="dropped CUDAExecutionProvider without an error"):
        open_runner(bundle)


@pytest.mark.usefixtures("session")
def test_callers_take_turns_in_the_one_thread_that_has_the_graphs(bundle: Bundle, cuda: FakeCuda) -> None:
    runner = open_runner(bundle)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda seed: run(runner, bundle, cuda, 1 + seed % 4, seed), range(32)))
    assert len(runner._session.threads) == 1
    assert sorted(runner._session.runs) == sorted([LAUNCH, 1, 2, 4] * 8)


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("first", [True, False])
def test_graphs_serve_calls_inside_and_outside_inference_mode(bundle: Bundle, cuda: FakeCuda, *, first: bool) -> None:
    runner = open_runner(bundle)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            run(runner, bundle, cuda, 2)
            run(runner, bundle, cuda, 3)
    assert runner._session.runs == [2, LAUNCH] * 3


def test_runner_is_closed_if_its_session_cannot_be_reopened(
    bundle: Bundle, cuda: FakeCuda, session: type[FakeCudaSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = open_runner(bundle)
    monkeypatch.setattr(session, "capture_fails", True)

    def fail(*_: object, **__: object) -> None:
        assert runner._session is None, "the old session's memory may be needed"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(BackendError, match="out of memory"):
        run(runner, bundle, cuda, 2)
    for batch in (2, 3):
        with pytest.raises(BackendError, match="closed"):
            run(runner, bundle, cuda, batch)


def test_reopened_session_waits_for_the_images(
    bundle: Bundle, cuda: FakeCuda, session: type[FakeCudaSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, runner, stream = bundle.manifest.spec, open_runner(bundle), cuda.new_stream()
    images, late = (torch.rand(2, 3, 42, 42).half() for _ in range(2))
    features = torch.empty(2, spec.num_tokens, spec.hidden_size).half()
    expected = [fake_answer(image, (spec.num_tokens, spec.hidden_size)) for image in late.numpy()]
    monkeypatch.setattr(session, "capture_fails", True)
    stream.submit(lambda: images.copy_(late))
    with cuda.stream(stream):
        runner.run(images, features)
    stream.synchronize()
    assert torch.equal(features, torch.from_numpy(np.stack(expected)))


@pytest.mark.usefixtures("session")
def test_callers_stream_waits_for_the_queued_work_of_a_failed_call(bundle: Bundle, cuda: FakeCuda) -> None:
    spec, queued = bundle.manifest.spec, list[str]()
    runner, stream = open_runner(bundle, cuda_graphs=False), cuda.new_stream()

    def fail(own: Any) -> None:
        own.submit(lambda: queued.append("before it failed"))
        raise ZeroDivisionError

    with cuda.stream(stream), pytest.raises(ZeroDivisionError):
        runner.run(torch.rand(1, 3, 42, 42).half(), torch.empty(1, spec.num_tokens, spec.hidden_size).half(), fail)
    stream.synchronize()
    assert queued


@pytest.mark.usefixtures("session")
def test_call_reads_images_after_earlier_work_in_the_callers_stream(bundle: Bundle, cuda: FakeCuda) -> None:
    spec = bundle.manifest.spec
    images, late = (torch.rand(3, 3, 42, 42).half() for _ in range(2))
    features = torch.empty(3, spec.num_tokens, spec.hidden_size).half()
    stream, runner = cuda.new_stream(), open_runner(bundle)
    expected = [fake_answer(image, (spec.num_tokens, spec.hidden_size)) for image in late.numpy()]
    stream.submit(lambda: images.copy_(late))
    with cuda.stream(stream):
        runner.run(images, features)
    stream.synchronize()
    assert torch.equal(features, torch.from_numpy(np.stack(expected)))


@pytest.mark.usefixtures("session")
def test_close_waits_for_the_gpu(bundle: Bundle, cuda: FakeCuda) -> None:
    spec = bundle.manifest.spec
    images, features = torch.rand(3, 3, 42, 42).half(), torch.zeros(3, spec.num_tokens, spec.hidden_size).half()
    runner = open_runner(bundle)
    runner.run(images, features)
    assert not features.any()
    runner.close()
    assert features.any()


@pytest.mark.usefixtures("session")
def test_closed_runner_refuses(bundle: Bundle, cuda: FakeCuda) -> None:
    runner = open_runner(bundle)
    run(runner, bundle, cuda, 1)
    runner.close()
    with pytest.raises(BackendError, match="closed"):
        run(runner, bundle, cuda, 1)
