"""PyTorch runs a bundle's graph as it is written, whatever its own global settings say."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from tests.export.checking import make_hashes_fit
from tests.runtime.fake_tensorrt_without_gpu import FakeCuda, FakeGraph, fake_answer
from trtower import BatchReport, Bundle, EngineOptions, VisionTower
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA
from trtower.errors import BackendError, BundleError
from trtower.extras import how_to_install
from trtower.graph.arithmetic import as_typed, multiplies_fp32
from trtower.graph.module import read_module
from trtower.runners import choose as choosing
from trtower.runners import torch as module
from trtower.runners.choose import candidates, choose
from trtower.runners.processor import multiplies_bf16
from trtower.runners.torch import CUDA, TorchCudaRunner
from trtower_export.checkpoint.checkpoint import open_checkpoint

SAME = 1e-6
"""Relative difference of two orders of summing in FP32 through three layers (3e-7 was measured)."""

ROUNDED = {"fp32": SAME, "fp16": 2e-3, "bf16": 2e-2}
"""Relative: what rounding the weights costs, and in BF16 every result (4e-4 and 8e-3 were measured)."""

MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
NUMBER = torch.__version__.partition("+")[0]
DEVICE = torch.device("cuda", 1)

with_bf16 = pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no BF16 arithmetic")


def draw(tower: VisionTower, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tower.image_size, tower.image_size, generator=generator)


def error(actual: Any, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def expect(checkpoint: Path, tower: VisionTower, images: torch.Tensor) -> torch.Tensor:
    opened = open_checkpoint(str(checkpoint))
    states = opened.family.read_states(opened.load_model(tower.spec), images)
    return states[tower.spec.layers[0]][:, tower.spec.num_prefix_tokens :]


@pytest.mark.parametrize(
    ("precision", "backend"),
    [
        ("fp32", "torch-cpu"),
        ("fp16", "torch-cpu"),
        ("bf16", "torch-cpu"),
        pytest.param("bf16", "torch-bf16", marks=with_bf16),
    ],
)
@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_features_match_pytorch(
    export: Callable[..., Path], checkpoints: dict[str, Path], family: str, precision: str, backend: str
) -> None:
    tower = VisionTower.load(export(family, precision=precision, flavour="none"), backend)
    images = draw(tower)
    assert error(tower(images), expect(checkpoints[family], tower, images)) <= ROUNDED[precision]
    assert tower.backend == f"torch {NUMBER}, CPU, {'BF16' if backend == 'torch-bf16' else 'FP32'}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="covers machines without a GPU")
def test_torch_stands_for_both_devices(fp32_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trtower"):
        assert choose(Bundle.open(fp32_bundle), "torch").backend == "torch-cpu"
    assert "passed over torch-cuda: no GPU here" in caplog.text
    assert [each.backend for each in candidates(Bundle.open(fp32_bundle), backend="torch")] == [
        "torch-cuda",
        "torch-cpu",
    ]
    with pytest.raises(BackendError, match="torch-cuda: no GPU here"):
        VisionTower.load(fp32_bundle, "torch-cuda")


def test_torch_on_the_cpu_is_a_warning_where_there_is_a_gpu(
    fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choosing, "has_gpu", lambda: True)
    choose(Bundle.open(fp32_bundle), "torch")
    assert "passed over torch-cuda" in caplog.text
    caplog.clear()
    choose(Bundle.open(fp32_bundle), "torch", "cpu")
    choose(Bundle.open(fp32_bundle), "torch-cpu")
    assert not caplog.text


def test_bf16_is_for_bundles_and_processors_that_have_it(
    export: Callable[..., Path], clip_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        BackendError, match="torch-bf16: it is for bundles in bf16, and this one is in fp16; use backend"
    ):
        VisionTower.load(clip_bundle, "torch-bf16")
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    with pytest.raises(BackendError, match="torch-bf16: this processor has no BF16 arithmetic; use backend torch-cpu"):
        VisionTower.load(export("clip", precision="bf16", flavour="none"), "torch-bf16")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_settings_of_the_process_change_no_bit(fp32_bundle: Path) -> None:
    """With BF16 products allowed, PyTorch's own linear layers lose 16 bits on processors that have them."""
    tower = VisionTower.load(fp32_bundle, "torch-cpu")
    images = draw(tower).requires_grad_()
    expected = tower(images.detach())
    for setting in (torch.autocast("cpu", dtype=torch.bfloat16), matmul_precision("medium"), torch.inference_mode()):
        with setting:
            found = tower(images)
        assert torch.equal(found, expected)
    features = torch.empty(2, 10, 64)
    tower.runner.run(images, features)
    assert not features.requires_grad


def test_default_device_and_dtype_of_the_process_are_not_the_towers(fp32_bundle: Path) -> None:
    """Models are often loaded inside `with torch.device(...)`."""
    expected = VisionTower.load(fp32_bundle, "torch-cpu")
    images = draw(expected)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            runner = choose(Bundle.open(fp32_bundle), "torch-cpu")
            features = torch.empty(2, 10, 64, device="cpu", dtype=torch.float32)
            runner.run(images, features)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(features[:, 1:], expected(images))


def test_settings_are_as_before_when_the_last_call_has_ended(fp32_bundle: Path) -> None:
    runner = choose(Bundle.open(fp32_bundle), "torch-cpu")
    inside: list[str] = []
    with matmul_precision("medium"):
        before = MATMUL.fp32_precision
        assert before == "bf16"
        images, features = torch.zeros(1, 3, 42, 42), torch.zeros(1, 10, 64)
        with as_typed("cpu", exact_fp32=True):  # another thread's call
            runner.run(images, features)
            inside.append(MATMUL.fp32_precision)
        assert (inside, MATMUL.fp32_precision) == (["ieee"], before)
        with pytest.raises(RuntimeError):
            runner.run(images[:, :1], features)
        assert MATMUL.fp32_precision == before
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.fixture
def sums_in_fp16() -> Iterator[Any]:
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_fp16_accumulation = True
    yield matmul
    matmul.allow_fp16_accumulation = False


def test_fp16_is_not_summed_in_fp16_while_a_call_on_cuda_lasts(sums_in_fp16: Any) -> None:
    """Also not if a call of another thread began earlier and ends first."""
    first, second, on_the_cpu = (as_typed(device, exact_fp32=False) for device in ("cuda", "cuda", "cpu"))
    with on_the_cpu:
        assert sums_in_fp16.allow_fp16_accumulation
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as another:
        thread.submit(first.__enter__).result()
        another.submit(second.__enter__).result()
        thread.submit(first.__exit__, None, None, None).result()
        assert not sums_in_fp16.allow_fp16_accumulation
        another.submit(second.__exit__, None, None, None).result()
    assert sums_in_fp16.allow_fp16_accumulation


def test_call_in_half_precision_leaves_the_settings_for_fp32_alone() -> None:
    with matmul_precision("high"), as_typed("cuda", exact_fp32=False):
        assert torch.get_float32_matmul_precision() == "high"
        assert MATMUL.fp32_precision == "tf32"


def test_graph_without_fp32_products_leaves_the_settings_alone(export: Callable[..., Path]) -> None:
    """They belong to the process: a tower in half precision must not slow down another model's FP32."""
    typed = {}
    for precision in ("fp16", "bf16", "fp32"):
        bundle = Bundle.open(export("clip", precision=precision, flavour="none"))
        graph = FUSED_GRAPH if precision != "fp32" else GRAPH
        read = read_module(onnx.load(bundle.path / graph, load_external_data=False), bundle.map(GRAPH_DATA))
        typed[precision] = multiplies_fp32(read)
    assert typed == {"fp16": False, "bf16": False, "fp32": True}
    bytes_in = Bundle.open(export("clip", precision="fp16", flavour="none", pixels="uint8"))
    model = onnx.load(bytes_in.path / FUSED_GRAPH, load_external_data=False)
    assert multiplies_fp32(read_module(model, bytes_in.map(GRAPH_DATA)))  # it may: bytes become FP32


def test_linear_layers_and_attention_are_pytorchs_own(fp32_bundle: Path, clip_bundle: Path) -> None:
    """The patches, and three layers with query, key and value in one product, and three more linear layers each."""
    for folder, graph in ((fp32_bundle, GRAPH), (clip_bundle, GRAPH), (clip_bundle, FUSED_GRAPH)):
        bundle = Bundle.open(folder)
        read = read_module(onnx.load(folder / graph, load_external_data=False), bundle.map(GRAPH_DATA))
        called = [node.target for node in read.graph.nodes if node.op == "call_function"]
        assert called.count(torch.nn.functional.scaled_dot_product_attention) == 3
        assert called.count(torch.nn.functional.linear) == 1 + 3 * 4
        assert torch.matmul not in called
        assert torch.softmax not in called


def test_bytes_of_any_layout_run(export: Callable[..., Path]) -> None:
    bundle = export("clip", precision="fp32", flavour="none", pixels="uint8", layout="nhwc")
    expected, tower = VisionTower.load(bundle, "onnxruntime-cpu"), VisionTower.load(bundle, "torch-cpu")
    pictures = [torch.randint(256, (50, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))]
    assert error(tower.encode(pictures), expected.encode(pictures)) <= SAME


def test_8_bits_have_the_error_that_they_have_elsewhere(
    export: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    """A number half-way between two steps goes to either, so two readers of one graph differ as much as from FP32."""
    bundle = export("clip", precision="fp8", flavour="none")
    tower, other = VisionTower.load(bundle, "torch-cpu"), VisionTower.load(bundle, "onnxruntime-cpu")
    images = draw(tower, 4)
    expected = expect(checkpoints["clip"], tower, images)
    assert error(tower(images), expected) <= 1.1 * error(other(images), expected)


def test_every_batch_of_the_profile_runs_on_the_callers_tensors(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle, "torch-cpu")
    images = draw(tower, 9).half()
    one_by_one = torch.cat([tower(image[None]) for image in images])
    assert error(tower(images), one_by_one) <= ROUNDED["fp16"]
    runner, spec = tower.runner, tower.spec
    around = torch.full((4, spec.num_tokens, spec.hidden_size), -1.0, dtype=torch.half)
    runner.run(images[:2], around[1:3])
    assert (around[[0, 3]] == -1).all()
    assert error(around[1:3, spec.num_prefix_tokens :], one_by_one[:2]) <= ROUNDED["fp16"]


def test_eight_threads_get_the_results_of_one(clip_bundle: Path) -> None:
    reports: list[BatchReport] = []
    tower = VisionTower.load(clip_bundle, "torch-cpu")
    tower.on_batch = reports.append
    batches = [draw(tower, 1 + seed % 4, seed).half() for seed in range(8)]
    expected = [tower(images) for images in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda index: tower(batches[index % 8]), range(40)))
    assert all(torch.equal(features, expected[index % 8]) for index, features in enumerate(results))
    assert {report.backend for report in reports} == {"torch-cpu"}


def test_closed_runner_says_so(fp32_bundle: Path) -> None:
    runner = choose(Bundle.open(fp32_bundle), "torch-cpu")
    runner.close()
    runner.close()
    with pytest.raises(BackendError, match="closed"):
        runner.run(torch.zeros(1, 3, 42, 42), torch.zeros(1, 10, 64))


def test_weights_are_its_own(fp32_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))
    tower = VisionTower.load(copy, "torch-cpu")
    expected = tower(draw(tower))
    with (copy / GRAPH_DATA).open("r+b") as stream:
        stream.write(b"\x7f" * 100_000)
    assert torch.equal(tower(draw(tower)), expected)


def test_without_onnx_the_extra_is_named(fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("trtower.extras.find_spec", lambda _: None)
    with pytest.raises(BackendError) as caught:
        VisionTower.load(fp32_bundle, "torch-cpu")
    assert f"torch-cpu needs the package onnx, which is not installed: {how_to_install('torch')}" in str(caught.value)


def change_graph(bundle: Path, change: Callable[[onnx.ModelProto], object], graph: str = FUSED_GRAPH) -> None:
    model = onnx.load(bundle / graph, load_external_data=False)
    change(model)
    (bundle / graph).write_bytes(model.SerializeToString())
    make_hashes_fit(bundle, graph)


def test_unknown_operator_is_an_obstacle_before_anything_is_loaded(
    spoilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_graph(spoilt, lambda model: setattr(model.graph.node[3], "op_type", "Mystery"))
    monkeypatch.setattr(Bundle, "map", lambda *_: pytest.fail("the weights are read"))
    (candidate,) = candidates(Bundle.open(spoilt), backend="torch-cpu")
    assert candidate.obstacle == (
        "tower.fused.onnx has the operator Mystery, which torch-cpu does not know; use another backend"
    )
    with pytest.raises(BackendError, match=r"torch-cpu: .*the operator Mystery"):
        VisionTower.load(spoilt, "torch-cpu")


def test_form_that_only_the_weights_show_is_an_error_on_one_line(spoilt: Path) -> None:
    def turn(model: onnx.ModelProto) -> None:
        node = model.graph.node[-1]
        model.graph.node.append(
            helper.make_node("Reshape", [node.output[0], node.input[-1]], ["turned"], name="turned")
        )

    change_graph(spoilt, turn)
    with pytest.raises(BackendError, match=rf"torch {NUMBER} could not load .*tower\.fused\.onnx: Reshape as turned"):
        VisionTower.load(spoilt, "torch-cpu")


def test_graph_with_other_tensors_than_the_manifest_is_refused(spoilt: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = model.graph.node[-1].output[0] = "something_else"

    change_graph(spoilt, rename)
    with pytest.raises(BundleError, match=r"tower\.fused\.onnx has \[\('something_else'"):
        VisionTower.load(spoilt, "torch-cpu")


def test_graph_that_reads_weights_from_elsewhere_is_refused(spoilt: Path) -> None:
    def lead_away(model: onnx.ModelProto) -> None:
        tensor = next(each for each in model.graph.initializer if each.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = "/etc/passwd"

    change_graph(spoilt, lead_away)
    with pytest.raises(BundleError, match=r"reads weights that are not in tower\.onnx\.data, so they cannot be"):
        VisionTower.load(spoilt, "torch-cpu")


@pytest.mark.parametrize("name", [FUSED_GRAPH, GRAPH_DATA])
def test_altered_file_is_refused(spoilt: Path, name: str) -> None:
    with (spoilt / name).open("r+b") as stream:
        stream.seek(100)
        stream.write(b"altered")
    with pytest.raises(BundleError, match=rf"{name} was altered"):
        VisionTower.load(spoilt, "torch-cpu")


def test_graph_that_is_no_graph_is_an_error_on_one_line(spoilt: Path) -> None:
    (spoilt / FUSED_GRAPH).write_bytes(b"no graph")
    make_hashes_fit(spoilt, FUSED_GRAPH)
    with pytest.raises(BackendError, match=r"could not load .*tower\.fused\.onnx: .+") as failure:
        VisionTower.load(spoilt, "torch-cpu")
    assert "\n" not in str(failure.value)


# On CUDA: a fake module fills the features with the pixels, as work in the stream that is current.


@pytest.fixture
def open_on_cuda(clip_bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TorchCudaRunner]:
    bundle = Bundle.open(clip_bundle)
    spec = bundle.manifest.spec

    def compute(images: torch.Tensor, features: torch.Tensor) -> None:
        assert cuda.current_device() == DEVICE

        def work() -> None:
            answers = [fake_answer(image, (spec.num_tokens, spec.hidden_size)) for image in images.numpy()]
            features.copy_(torch.from_numpy(np.stack(answers)))

        cuda.current_stream().submit(work)

    monkeypatch.setattr(module, "LoadedGraph", lambda *_, packed: SimpleNamespace(compute=compute))

    def open_it(**options: Any) -> TorchCudaRunner:
        return TorchCudaRunner(bundle, FUSED_GRAPH, CUDA, DEVICE, EngineOptions(**options))

    return open_it


def run_on_cuda(runner: TorchCudaRunner, cuda: FakeCuda, batch: int, seed: int = 0, stream: Any = None) -> None:
    images = torch.rand(batch, 3, 42, 42, generator=torch.Generator().manual_seed(seed)).half()
    features = torch.full((batch, 10, 64), -1.0, dtype=torch.half)
    stream = stream or cuda.new_stream()
    with cuda.stream(stream):
        runner.run(images, features)
    stream.synchronize()
    expected = np.stack([fake_answer(image, (10, 64)) for image in images.numpy()])
    assert torch.equal(features, torch.from_numpy(expected))


def test_cuda_batches_of_the_profile_are_replayed_and_others_launched(
    open_on_cuda: Callable[..., TorchCudaRunner], cuda: FakeCuda
) -> None:
    runner, stream = open_on_cuda(), cuda.new_stream()
    for seed, batch in enumerate((1, 3, 2, 1, 4, 3, 2)):
        run_on_cuda(runner, cuda, batch, seed, stream)
    assert [graph.replays for graph in cuda.graphs] == [2, 2, 1]  # of 1, 2 and 4
    assert len({graph.pool for graph in cuda.graphs}) == 1
    assert runner.name == f"torch {NUMBER}, sm89"


def test_cuda_weights_are_ready_for_every_stream_when_the_tower_is_loaded(
    clip_bundle: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready: list[str] = []

    def load(*_: object, packed: bool) -> SimpleNamespace:
        cuda.current_stream().submit(lambda: ready.append("weights"))
        return SimpleNamespace(compute=None)

    monkeypatch.setattr(module, "LoadedGraph", load)
    TorchCudaRunner(Bundle.open(clip_bundle), FUSED_GRAPH, CUDA, DEVICE, EngineOptions())
    assert ready == ["weights"]


def test_cuda_runs_without_graphs_if_asked_to(open_on_cuda: Callable[..., TorchCudaRunner], cuda: FakeCuda) -> None:
    runner = open_on_cuda(cuda_graphs=False)
    run_on_cuda(runner, cuda, 2)
    assert not cuda.graphs


def test_cuda_memory_that_ends_during_a_capture_is_said_once(
    open_on_cuda: Callable[..., TorchCudaRunner],
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(FakeGraph, "fails", True)
    runner = open_on_cuda()
    for batch in (1, 2, 1, 4):
        run_on_cuda(runner, cuda, batch)
    assert len([r for r in caplog.records if "CUDA graphs are off" in r.getMessage()]) == 1
    assert len(cuda.graphs) == 1


def test_cuda_streams_have_slots_of_their_own_within_the_bound(
    open_on_cuda: Callable[..., TorchCudaRunner], cuda: FakeCuda
) -> None:
    runner = open_on_cuda(contexts=2)
    streams = [cuda.new_stream() for _ in range(3)]
    for seed, stream in enumerate(streams):
        run_on_cuda(runner, cuda, 2, seed, stream)
    assert len({graph.pool for graph in cuda.graphs}) == 2
    run_on_cuda(runner, cuda, 2, stream=cuda.find_stream(0))  # torch's default stream can be replayed into
    runner.close()
    with pytest.raises(BackendError, match="closed"):
        run_on_cuda(runner, cuda, 2)
