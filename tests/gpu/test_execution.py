"""What only a GPU can show: a bundle runs, matches PyTorch, and works in its caller's stream."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from trtower import BatchReport, EngineOptions
from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Certificate
from trtower.flavour import FLAVOURS
from trtower.parity.bounds import BOUNDS
from trtower.runners.choose import choose
from trtower.tower.vision_tower import VisionTower
from trtower_export.check.certify import certify
from trtower_export.check.photographs import Photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.console import LoggedProgress

pytestmark = pytest.mark.gpu

SAME_ANSWER = 2 * BOUNDS["fp16"].relative_error
"""Relative error between two runs of one FP16 plan. TensorRT may choose other kernels for another batch, and each run
may err by the bound. Features of another image, or half-written ones, are off by about 1."""

SLEEP_CYCLES = 1_000_000_000
"""About half a second on a GPU of 1 to 2 GHz: a thousand times what a tiny tower takes."""

THREADS = 8
CALLS_PER_THREAD = 20
CALLS_FOR_MEMORY = 1000

LEAK_MIB = 32
"""Growth of the GPU's used memory over CALLS_FOR_MEMORY that is not a leak: leaking 1/30 MiB per call exceeds it."""


def draw_images(tower: VisionTower, batch: int, seed: int = 0) -> torch.Tensor:
    """Draw random images (B, 3, S, S), on the tower's device and in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, tower.image_size, tower.image_size, generator=generator)
    return images.to(tower.device, tower.dtype)


def run(tower: VisionTower, images: torch.Tensor) -> torch.Tensor:
    features = tower(images)
    assert isinstance(features, torch.Tensor)
    return features


def error_of_worst_image(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest ‖x - ref‖ / ‖ref‖ of any image; infinity if a value is not finite."""
    assert actual.shape == expected.shape
    x, ref = actual.double().flatten(1), expected.double().flatten(1)
    worst = float(((x - ref).norm(dim=1) / ref.norm(dim=1)).max())
    return worst if bool(x.isfinite().all()) else float("inf")


def check(bundle: Path, checkpoint: Path, pictures: Photographs, backend: str) -> Certificate:
    opened = open_checkpoint(str(checkpoint))
    return certify(Bundle.open(bundle), opened, pictures, backend=backend, progress=LoggedProgress())


@contextmanager
def no_synchronisation_by_torch() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_tensorrt_rtx_does_on_this_gpu(request: pytest.FixtureRequest) -> None:
    """Record the outcome, and compare it with what trtower predicts."""
    outcome = request.getfixturevalue("rtx_outcome")
    text = json.dumps(asdict(outcome), indent=2)
    print(text)  # noqa: T201 - shown by pytest -s or -rP
    if out := os.environ.get("OUT"):
        (Path(out) / "rtx_on_gpu.json").write_text(text + "\n", encoding="utf-8")
    assert (outcome.outcome == "runs") == (outcome.obstacle is None)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_every_backend_gives_the_answers_of_fp32_pytorch(
    built: Callable[[str, str, str], Path],
    checkpoints: dict[str, Path],
    pictures: Photographs,
    capability: str,
    backend: str,
    family: str,
    precision: str,
) -> None:
    if precision == "bf16" and float(capability) < 8.0:
        pytest.skip(f"bf16 needs compute capability 8.0 or later; this GPU has {capability}")
    certificate = check(built(family, precision, backend), checkpoints[family], pictures, backend)
    assert certificate.ran == ("plan" if backend in FLAVOURS else "graph")
    assert certificate.backend == backend
    assert not certificate.not_run
    assert certificate.passed, certificate.bounds


def test_auto_picks_the_best_and_says_so(clip_tower: VisionTower, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=choose.__module__):
        tower = VisionTower.load(clip_tower.bundle.path)
    assert tower.backend == clip_tower.backend
    assert any(f"runs on {tower.backend}" in record.getMessage() for record in caplog.records)


def test_auto_passes_over_a_plan_that_does_not_run_here_and_says_so(
    request: pytest.FixtureRequest, built: Callable[[str, str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    outcome = request.getfixturevalue("rtx_outcome")
    if outcome.outcome == "runs":
        pytest.skip(f"tensorrt-rtx {outcome.version} runs on this GPU")
    with caplog.at_level(logging.WARNING, logger=choose.__module__):
        tower = VisionTower.load(built("clip", "fp16", "tensorrt-rtx"))
    assert not tower.backend.startswith("tensorrt-rtx")
    assert any(
        "passed over" in record.getMessage() and "tensorrt-rtx: " in record.getMessage() for record in caplog.records
    )


def test_features_stay_on_the_gpu_in_the_dtype_of_the_images(clip_tower: VisionTower, gpu: torch.device) -> None:
    for images in (draw_images(clip_tower, 2), torch.zeros(2, 3, clip_tower.image_size, clip_tower.image_size)):
        features = run(clip_tower, images)
        assert (features.device, features.dtype) == (gpu, images.dtype)
        assert features.shape == (2, clip_tower.num_patches, clip_tower.hidden_size)


def test_batch_over_the_maximum_gives_each_image_its_own_answer(clip_tower: VisionTower) -> None:
    images = draw_images(clip_tower, 2 * clip_tower.bundle.manifest.batch.max + 1)
    one_by_one = torch.cat([run(clip_tower, image[None].clone()) for image in images])
    assert error_of_worst_image(run(clip_tower, images), one_by_one) <= SAME_ANSWER


def test_list_gives_what_the_batch_gives(clip_tower: VisionTower) -> None:
    images = draw_images(clip_tower, 3)
    features = clip_tower(list(images))
    assert isinstance(features, list)
    assert [tuple(f.shape) for f in features] == [(1, clip_tower.num_patches, clip_tower.hidden_size)] * 3
    assert error_of_worst_image(torch.cat(features), run(clip_tower, images)) <= SAME_ANSWER


def test_work_follows_what_the_callers_stream_holds(clip_tower: VisionTower) -> None:
    late, images = draw_images(clip_tower, 2), draw_images(clip_tower, 2, seed=1)
    expected = run(clip_tower, late)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        images.copy_(late)
        features = run(clip_tower, images)
    side.synchronize()
    assert error_of_worst_image(features, expected) <= SAME_ANSWER


@pytest.mark.parametrize("where", ["default stream", "side stream"])
def test_call_does_not_wait_for_the_gpu(clip_tower: VisionTower, where: str) -> None:
    stream = torch.cuda.default_stream() if where == "default stream" else torch.cuda.Stream()
    images = draw_images(clip_tower, 2)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        run(clip_tower, images)
        stream.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        with no_synchronisation_by_torch():
            run(clip_tower, images)
        returned_early = not stream.query()
    stream.synchronize()
    assert returned_early


def test_eight_threads_on_two_streams_get_the_answers_of_one(clip_tower: VisionTower) -> None:
    batches = [draw_images(clip_tower, 1 + index % 4, seed=index) for index in range(THREADS)]
    expected = [run(clip_tower, images) for images in batches]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()

    def serve(thread: int) -> float:
        with torch.cuda.stream(streams[thread % 2]):
            features = [run(clip_tower, batches[thread]) for _ in range(CALLS_PER_THREAD)]
            return max(error_of_worst_image(result, expected[thread]) for result in features)

    with ThreadPoolExecutor(THREADS) as pool:
        errors = list(pool.map(serve, range(THREADS)))
    assert max(errors) <= SAME_ANSWER, errors


@pytest.mark.parametrize("options", [{"cuda_graphs": False}, {"contexts": 1}, {"kernel_specialization": "eager"}])
def test_options_change_no_answer(clip_tower: VisionTower, backend: str, options: dict[str, Any]) -> None:
    with VisionTower.load(clip_tower.bundle.path, backend, engine=EngineOptions(**options)) as other:
        for batch in range(1, clip_tower.bundle.manifest.batch.max + 2):
            images = draw_images(clip_tower, batch, seed=batch)
            for _ in range(3):  # the first one captures or compiles
                features = run(other, images)
            assert error_of_worst_image(features, run(clip_tower, images)) <= SAME_ANSWER


def test_streams_have_no_more_contexts_than_the_bound(clip_tower: VisionTower, backend: str) -> None:
    if backend == "onnxruntime-cuda":
        pytest.skip("ONNX Runtime has no contexts: its calls take turns")
    with VisionTower.load(clip_tower.bundle.path, backend, engine=EngineOptions(contexts=2)) as tower:
        images = draw_images(tower, 2)
        expected = run(tower, images)
        torch.cuda.synchronize()
        for _ in range(8):
            with torch.cuda.stream(torch.cuda.Stream()):
                features = run(tower, images)
            torch.cuda.synchronize()
            assert error_of_worst_image(features, expected) <= SAME_ANSWER
        assert tower.runner._slots._size <= 2


def test_run_time_is_told_by_the_gpu(clip_tower: VisionTower) -> None:
    reports: list[BatchReport] = []
    clip_tower.on_batch = reports.append
    try:
        run(clip_tower, draw_images(clip_tower, 2))
    finally:
        clip_tower.on_batch = None
    (report,) = reports
    assert 0 < report.run_s < 1


def test_closed_tower_gives_its_memory_back(clip_tower: VisionTower, backend: str) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    tower = VisionTower.load(clip_tower.bundle.path, backend).warmup()
    assert torch.cuda.memory_allocated() > before
    tower.close()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_compiled_kernels_are_kept_beside_the_bundle(clip_tower: VisionTower, backend: str) -> None:
    if backend != "tensorrt-rtx":
        pytest.skip("only TensorRT-RTX compiles while it runs")
    path = clip_tower.bundle.path
    VisionTower.load(path, backend).warmup().close()
    assert list((path.parent / f".{path.name}.runtime-cache").glob("*.cache"))


def test_memory_is_flat_over_a_thousand_calls(clip_tower: VisionTower) -> None:
    images = draw_images(clip_tower, 2)
    run(clip_tower, images)
    torch.cuda.synchronize()
    by_torch, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(CALLS_FOR_MEMORY):
        run(clip_tower, images)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == by_torch
    assert free - torch.cuda.mem_get_info()[0] <= LEAK_MIB << 20  # torch does not count TensorRT's own memory


def test_slice_of_a_batch_gets_its_own_answer(clip_tower: VisionTower) -> None:
    # The last test of its backend: if TensorRT needs a wider alignment, the CUDA error stays until the process ends.
    images = draw_images(clip_tower, 2)
    assert images[1:].data_ptr() % 16, "with this image size every slice is aligned"
    assert error_of_worst_image(run(clip_tower, images[1:]), run(clip_tower, images[1:].clone())) <= SAME_ANSWER
