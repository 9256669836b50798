"""Load, warm up, observe and close a tower, which belongs to one process."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtower import BatchReport, CLIPVisionTower, VisionTower
from trtower.errors import BackendError, ConfigError, InputError
from trtower.runners.base import Runner
from trtower.runners.choose import choose

CPU = ("onnxruntime-cpu", "openvino")
THREADS = 8
PATIENCE_S = 30


@pytest.fixture(params=CPU)
def tower(clip_bundle: Path, request: pytest.FixtureRequest) -> Iterator[VisionTower]:
    with VisionTower.load(clip_bundle, request.param) as tower:
        yield tower


def draw(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 42, 42, generator=torch.Generator().manual_seed(seed)).half()


def test_closed_tower_raises_and_can_be_loaded_again(tower: VisionTower) -> None:
    before = tower(draw(2))
    runner = tower.runner
    tower.close()
    tower.close()
    assert not tower.is_loaded
    assert tower.backend == "not loaded"
    with pytest.raises(BackendError, match=r"is not loaded, or was closed\. Call load_model\(\)"):
        tower(draw(2))
    with pytest.raises(BackendError, match="closed"):
        runner.run(draw(1), torch.empty(1, 10, 64).half())
    tower.load_model()
    assert torch.equal(tower(draw(2)), before)


def test_with_block_closes_the_tower_even_after_an_error(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle)
    with pytest.raises(ZeroDivisionError), tower as entered:
        raise ZeroDivisionError(entered.is_loaded)
    assert not tower.is_loaded


def test_closing_waits_for_the_call_in_flight(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle, "openvino")
    in_flight, log = [], []

    def on_start(_: object) -> None:
        in_flight.append(True)
        time.sleep(0.2)
        log.append("ran")

    features = torch.empty(1, 10, 64).half()
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(tower.runner.run, draw(1), features, on_start)
        while not in_flight:
            time.sleep(1e-3)
        tower.close()
        log.append("closed")
        call.result(PATIENCE_S)
    assert log == ["ran", "closed"]


def test_warm_up_runs_what_the_profile_is_made_for(
    tower: VisionTower, count_calls: Callable[[VisionTower], list[int]]
) -> None:
    calls = count_calls(tower)
    assert tower.warmup() is tower
    assert calls == [1, 2, 4]
    calls.clear()
    for wrong in ([-1], [0], ["8"], "8", 1.5, [True]):
        with pytest.raises(ConfigError, match="warmup expects numbers of images"):
            tower.warmup(wrong)  # type: ignore[arg-type]
    tower.warmup([3, 9])
    assert calls == [3, 4, 4, 1]


def test_warm_up_needs_a_loaded_tower(clip_bundle: Path) -> None:
    args = SimpleNamespace(mm_vision_select_layer=-2)
    with pytest.raises(BackendError, match=r"Call load_model\(\)"):
        CLIPVisionTower(clip_bundle, args, delay_load=True).warmup()


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_tower_is_neither_pickled_nor_copied(tower: VisionTower, how: Callable[[object], object]) -> None:
    model = torch.nn.ModuleDict({"vision_tower": tower})
    for thing in (tower, model) if how is not copy.copy else (tower,):
        with pytest.raises(BackendError, match=r"cannot be pickled or copied.*Pass the bundle's path instead"):
            how(thing)


FORK = """
import gc, os, sys
import torch
from trtower import VisionTower
from trtower.errors import BackendError
path, backend = sys.argv[1:]
tower, images = VisionTower.load(path, backend), torch.rand(3, 3, 42, 42).half()
tower(images)
if not os.fork():
    for attempt in (
        lambda: tower(images), tower.warmup, tower.load_model, lambda: tower.to("meta"),
        lambda: VisionTower.load(path, backend),
    ):
        try:
            print(f"goes on: {attempt()}")
        except BackendError as err:
            print(err)
    tower.close()
    del tower
    gc.collect()
    sys.stdout.flush()
    os._exit(0)  # as multiprocessing ends a fork; ONNX Runtime's own destructors hang in one, with or without trtower
print("child ends with", os.wait()[1])
print("parent goes on", tuple(tower(images).shape))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("backend", CPU)
def test_fork_refuses_what_would_hang_there(clip_bundle: Path, backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(clip_bundle), backend],
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
    )
    assert not done.returncode, done.stderr
    *refused, child, parent = done.stdout.splitlines()
    for line in refused[:2]:
        assert "this process is a fork of it, where no backend runs. Start processes with 'spawn'" in line
    for line in refused[2:]:
        assert (
            "after a tower had been loaded there; the threads of torch and of a backend do not survive a fork" in line
        )
    assert (len(refused), child, parent) == (5, "child ends with 0", "parent goes on (3, 9, 64)")


LOADED_IN_FORK = """
import os, sys
from types import SimpleNamespace
import torch
from trtower import CLIPVisionTower
torch.set_num_threads(1)  # torch's own threads, if it had started any, would not exist in the fork
tower = CLIPVisionTower(sys.argv[1], SimpleNamespace(mm_vision_select_layer=-2), delay_load=True)
if not os.fork():
    tower.load_model()
    print(tuple(tower(torch.rand(1, 3, 42, 42).half()).shape))
    tower.close()
    print(tower.is_loaded)
    sys.stdout.flush()
    os._exit(0)
print("child ends with", os.wait()[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_tower_that_was_made_before_a_fork_is_loaded_after_it(clip_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED_IN_FORK, str(clip_bundle)],
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
    )
    assert done.stdout.splitlines() == ["(1, 9, 64)", "False", "child ends with 0"], done.stderr


def test_calls_go_on_while_another_thread_reopens_the_tower(tower: VisionTower, one_thread: None) -> None:
    del one_thread
    images = draw(9)
    expected, stop = tower(images), threading.Event()

    def serve() -> int:
        calls = 0
        while not stop.is_set():
            assert torch.equal(tower(images), expected)
            calls += 1
        return calls

    with ThreadPoolExecutor(4) as threads:
        served = [threads.submit(serve) for _ in range(4)]
        for _ in range(5):
            tower._engine.open(torch.device("cpu"))()
        stop.set()
        assert all(each.result(PATIENCE_S) for each in served)


def test_call_of_several_pieces_ends_before_the_tower_closes(tower: VisionTower) -> None:
    images, begun, reports = draw(9), threading.Event(), list[BatchReport]()
    expected = tower(images)

    def report_slowly(report: BatchReport) -> None:
        begun.set()
        time.sleep(0.05)
        reports.append(report)

    tower.on_batch = report_slowly
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(tower, images)
        assert begun.wait(PATIENCE_S)
        tower.close()
        assert len(reports) == 3
        assert torch.equal(call.result(PATIENCE_S), expected)


def test_threads_that_load_one_tower_open_it_once(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Runner] = []

    def watch(*args: Any, **kwargs: Any) -> Runner:
        opened.append(choose(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr("trtower.tower.engine.choose", watch)
    tower = CLIPVisionTower(clip_bundle, SimpleNamespace(mm_vision_select_layer=-2), delay_load=True)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: (tower.load_model(), tower(draw(1))), range(4)))
    assert len(opened) == 1


def test_tower_cannot_be_closed_inside_its_own_call(tower: VisionTower) -> None:
    tower.on_batch = lambda _: tower.close()
    with pytest.raises(BackendError, match="cannot be closed or moved inside its own call"):
        tower(draw(1))
    tower.on_batch = None
    assert tower(draw(1)).shape == (1, 9, 64)


def test_callback_can_load_and_cast_the_tower_while_it_moves(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the old engine waits for its calls, but holds no lock that a call may need."""
    begun, go_on = threading.Event(), threading.Event()

    def load_and_cast(_: BatchReport) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        tower.load_model()
        tower.half()

    tower.on_batch = load_and_cast
    with ThreadPoolExecutor(2) as threads:
        call = threads.submit(tower, draw(1))
        assert begun.wait(PATIENCE_S)
        with tower._engine.changing:
            close = tower._engine.open(torch.device("cpu"))
        moving = threads.submit(close)
        go_on.set()
        assert call.result(PATIENCE_S).shape == (1, 9, 64)
        moving.result(PATIENCE_S)


def test_tower_that_is_closed_while_it_moves_stays_closed(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def choose_late(bundle: Any, backend: str, device: Any, **options: Any) -> Runner:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return choose(bundle, backend, "cpu", **options)

    monkeypatch.setattr("trtower.tower.engine.choose", choose_late)
    monkeypatch.setattr(tower._engine, "_device_after", lambda *_: torch.device("cpu:0"))  # another device to torch
    with ThreadPoolExecutor(2) as threads:
        moving = threads.submit(tower.to, "cuda")
        assert begun.wait(PATIENCE_S)
        closing = threads.submit(tower.close)
        time.sleep(0.05)
        go_on.set()
        moving.result(PATIENCE_S)
        closing.result(PATIENCE_S)
    assert not tower.is_loaded


STUCK = """
import sys, threading, time
import torch
from trtower import VisionTower
tower, begun = VisionTower.load(*sys.argv[1:]), threading.Event()
tower.on_batch = lambda _: (begun.set(), time.sleep(3600))
threading.Thread(target=tower, args=(torch.rand(1, 3, 42, 42),), daemon=True).start()
begun.wait()
print("main ends")
"""


@pytest.mark.parametrize("backend", CPU)
def test_python_exits_even_if_a_call_does_not_end(clip_bundle: Path, backend: str) -> None:
    command = [sys.executable, "-c", STUCK, str(clip_bundle), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "main ends\n")


def test_garbage_collected_tower_is_closed(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle, "openvino")
    runner = tower.runner
    del tower
    gc.collect()
    with pytest.raises(BackendError, match="closed"):
        runner.run(draw(1), torch.empty(1, 10, 64).half())


def test_move_that_fails_leaves_the_tower_where_it_is_every_time(tower: VisionTower) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="'meta' has no backend"):
            tower.to("meta")
        assert tower.device == torch.device("cpu")
    assert tower.to("cpu")(draw(1)).shape == (1, 9, 64)
    tower.close()
    tower.load_model()


def test_loaded_tower_is_not_silently_loaded_elsewhere(tower: VisionTower) -> None:
    tower.load_model("cpu")
    with pytest.raises(BackendError, match=r"is already loaded on cpu\. To move it: \.to\('cuda:3'\)"):
        tower.load_model("cuda:3")


def test_callback_receives_a_report_of_every_engine_call(tower: VisionTower) -> None:
    reports: list[BatchReport] = []
    tower.on_batch = reports.append
    tower(draw(9))
    assert [report.batch for report in reports] == [4, 4, 1]
    assert {report.backend for report in reports} == {tower.runner.backend}
    assert all(0 <= report.queue_s < PATIENCE_S and 0 < report.run_s < PATIENCE_S for report in reports)
    tower.on_batch = None
    tower(draw(1))
    assert len(reports) == 3


def test_queue_time_is_reported_apart_from_run_time(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle, "openvino")
    reports: list[BatchReport] = []
    tower.on_batch = reports.append
    pool = tower.runner._requests
    with ThreadPoolExecutor(1) as thread:
        with pool.lend():
            call = thread.submit(tower, draw(1))
            time.sleep(0.2)
        call.result(PATIENCE_S)
    (report,) = reports
    assert report.queue_s > 0.1 > report.run_s


def test_nvtx_ranges_are_opened_and_closed_around_each_call(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    tower(draw(1))
    assert not calls
    tower.nvtx = True
    tower(draw(5))
    backend = tower.runner.backend
    assert calls == [f"trtower {backend} batch 4", "pop", f"trtower {backend} batch 1", "pop"]


def test_nvtx_is_refused_if_torch_lacks_it(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match="nvtx=True needs NVTX, but this torch is built without CUDA"):
        tower.nvtx = True
    tower.nvtx = False
    assert tower(draw(1)).shape == (1, 9, 64)


def test_callback_that_is_falsy_is_still_called(tower: VisionTower) -> None:
    class Reports(list[BatchReport]):
        def __call__(self, report: BatchReport) -> None:
            self.append(report)

    tower.on_batch = Reports()
    tower(draw(1))
    assert len(tower.on_batch) == 1


def test_capture_of_a_cuda_graph_around_the_tower_is_refused(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    tower(draw(1))  # a CUDA graph does not concern what runs on the CPU
    monkeypatch.setattr(tower._engine, "runner", SimpleNamespace(device=torch.device("cuda", 0)))
    with pytest.raises(BackendError, match="cannot run inside a CUDA graph capture"):
        tower(draw(1))
    monkeypatch.undo()


def test_features_are_written_into_out(tower: VisionTower) -> None:
    images = draw(2)
    out = torch.full((2, 9, 64), -1.0)
    assert tower(images, out=out) is out
    assert torch.equal(out, tower(images).float())
    tiles = torch.empty(1, 2, 9, 64)
    assert torch.equal(tower(images[None], out=tiles)[0], out)


def test_engine_writes_into_out_directly_if_everything_is_picked(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, run, addresses = draw(6), tower.runner.run, list[int]()
    expected = tower(images)

    def watch(pixel_values: torch.Tensor, hidden_states: torch.Tensor, *rest: Any) -> None:
        addresses.append(hidden_states.data_ptr())
        run(pixel_values, hidden_states, *rest)

    monkeypatch.setattr(tower.runner, "run", watch)
    tower.select_feature = "cls_patch"
    whole = torch.empty(6, 10, 64).half()
    assert tower(images, out=whole) is whole
    assert addresses == [whole.data_ptr(), whole[4].data_ptr()]  # two calls, as the profile ends at 4
    assert torch.equal(whole[:, 1:], expected)
    assert torch.equal(tower(images[None], out=torch.empty_like(whole)[None])[0], whole)
    strided, wider = torch.empty(6, 64, 10).half().mT, torch.empty(6, 10, 64)
    tower.select_feature = "patch"
    fewer = torch.empty(6, 9, 64).half()
    for out, feature in ((strided, "cls_patch"), (wider, "cls_patch"), (fewer, "patch")):
        addresses.clear()
        tower.select_feature = feature
        tower(images, out=out)
        assert out.data_ptr() not in addresses
        assert torch.equal(out.half(), whole if feature == "cls_patch" else expected)


def test_out_can_share_memory_with_the_images(tower: VisionTower) -> None:
    tower.select_feature = "cls_patch"
    images = draw(2)
    expected = tower(images)
    out = images.flatten()[: expected.numel()].view(expected.shape)
    assert torch.equal(tower(images, out=out), expected)


def test_out_is_not_rounded_to_the_dtype_of_the_images(tower: VisionTower) -> None:
    images = draw(2).bfloat16()
    exact = tower(images.half())
    assert torch.equal(tower(images, out=torch.empty_like(exact)), exact)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 9, 64).int(), "out has dtype torch.int32"),
        (torch.empty(2, 10, 64), r"out is \(2, 10, 64\) on cpu; expected \(2, 9, 64\) on cpu"),
        (torch.empty(2, 9, 64, device="meta"), r"out is \(2, 9, 64\) on meta"),
        ([], "out is of type list"),
    ],
)
def test_out_of_another_shape_dtype_or_device_is_refused(tower: VisionTower, out: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tower(draw(2), out=out)
    with pytest.raises(InputError, match="images is a list"):
        tower([draw(1)[0]], out=torch.empty(1, 9, 64))


@pytest.mark.parametrize("calls", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_eight_threads_get_their_own_features(tower: VisionTower, one_thread: None, calls: int) -> None:
    del one_thread
    batches = [draw(1 + seed % 3, seed) for seed in range(THREADS)]
    expected = [tower(images) for images in batches]
    turns = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            equal = pool.map(
                lambda call: torch.equal(tower(batches[call % THREADS]), expected[call % THREADS]), range(calls)
            )
            assert all(equal)
    finally:
        sys.setswitchinterval(turns)
