"""`auto` chooses the fastest backend that keeps the bounds, judged by the bundle's certificates."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.export import made_up
from trtower import Bundle, EngineOptions, VisionTower
from trtower.bundle.staging import describe, locked
from trtower.errors import BackendError
from trtower.runners import choose as choosing
from trtower.runners import device, onnxruntime, openvino, runtimes, tensorrt
from trtower.runners import torch as pytorch
from trtower.runners.choose import Candidate, candidates, choose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="covers machines without a GPU")


@pytest.fixture(autouse=True)
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that every processor has BF16; on those without, OpenVINO computes in FP32."""
    monkeypatch.setattr(openvino, "has_bf16", lambda _: True)


@pytest.fixture
def bundle(spoilt: Path) -> Bundle:
    return Bundle.open(spoilt)


def certify(bundle: Bundle, backend: str, *, passed: bool = True) -> Bundle:
    """Add a certificate for the graph as it is now."""
    graph = "tower.fused.onnx" if backend.startswith(("onnxruntime", "torch")) else "tower.onnx"
    files = {name: bundle.manifest.files[name].sha256 for name in (graph, "tower.onnx.data")}
    bounds = tuple(replace(bound, holds=passed) for bound in made_up.bounds())
    certificate = made_up.certificate(backend=backend, files=files, executed=tuple(files), bounds=bounds, passed=passed)
    with locked(bundle.path):
        return bundle.add_certificate(certificate)


def test_takes_openvino_in_fp32_for_fp16(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose(bundle).backend == "openvino"
    assert (
        "openvino-bf16: it computes in BF16, which is coarser than fp16, and the bundle has no valid certificate of a "
        f"check on it: trtower check {bundle.path} --backend openvino-bf16" in caplog.text
    )


def test_takes_bf16_if_it_is_certified(bundle: Bundle) -> None:
    assert choose(certify(bundle, "openvino-bf16")).backend == "openvino-bf16"


def test_certificate_of_other_files_does_not_count(bundle: Bundle) -> None:
    certified = certify(bundle, "openvino-bf16")
    files = {**certified.manifest.files, "tower.onnx": replace(certified.manifest.files["tower.onnx"], sha256="0" * 64)}
    (candidate,) = (
        each
        for each in candidates(Bundle(bundle.path, replace(certified.manifest, files=files)))
        if each.backend == "openvino-bf16"
    )
    assert "has no valid certificate of a check" in (candidate.reservation or "")


def test_passes_over_what_missed_its_bounds(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    failed = certify(bundle, "openvino", passed=False)
    with caplog.at_level(logging.WARNING):
        assert choose(failed).backend == "onnxruntime-cpu"
    assert f"openvino: its check of {made_up.certificate().date} missed " in caplog.text


def test_failed_check_of_a_worse_backend_is_not_mentioned(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    failed = certify(bundle, "onnxruntime-cpu", passed=False)
    with caplog.at_level(logging.INFO):
        assert choose(failed).backend == "openvino"
    (record,) = (each for each in caplog.records if "runs on" in each.getMessage())
    assert record.levelno == logging.INFO
    assert "onnxruntime-cpu" not in record.getMessage()


def test_log_does_not_repeat_why_the_chosen_backend_was_first_passed_over(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    for backend in ("openvino", "onnxruntime-cpu", "torch-cpu"):
        bundle = certify(bundle, backend, passed=False)
    with caplog.at_level(logging.INFO):
        assert choose(bundle).backend == "openvino"
    (line,) = (each.getMessage() for each in caplog.records if "runs on" in each.getMessage())
    assert "openvino-bf16: " in line
    assert "openvino: " not in line
    assert line.count("onnxruntime-cpu") == 0


def test_takes_what_missed_its_bounds_if_nothing_else_runs_and_warns(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    for backend in ("openvino", "onnxruntime-cpu", "torch-cpu", "openvino-bf16"):
        bundle = certify(bundle, backend, passed=False)
    tower = VisionTower.load(bundle.path)
    assert tower.backend.endswith(", CPU, FP32")  # not BF16, which is coarser
    assert "failed its check on openvino" in caplog.text


def test_takes_what_is_certified_if_that_is_required(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    certify(bundle, "onnxruntime-cpu")
    assert choose(Bundle.open(bundle.path)).backend == "openvino"
    with caplog.at_level(logging.INFO):
        assert choose(Bundle.open(bundle.path), certified=True).backend == "onnxruntime-cpu"
    assert f"openvino: it has no valid certificate: trtower verify {bundle.path} --backend openvino" in caplog.text


def test_named_backend_runs_whatever_a_check_said(bundle: Bundle) -> None:
    assert choose(certify(bundle, "openvino", passed=False), "openvino").backend == "openvino"
    assert choose(bundle, "openvino-bf16").backend == "openvino-bf16"


def test_says_everything_that_stood_against_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, export: Callable[..., Path]
) -> None:
    for module in (openvino, onnxruntime, pytorch):
        monkeypatch.setattr(module, "import_extra", lambda *_, **__: (_ for _ in ()).throw(ImportError("gone")))
    with pytest.raises(BackendError) as failure:
        choose(bundle)
    message = str(failure.value)
    for backend in ("tensorrt: ", "tensorrt-rtx, ", "onnxruntime-cuda: no GPU here", "openvino-bf16, openvino, "):
        assert message.count(backend) == 1
    # First what an extra would mend, then what this machine lacks; backends share a reason.
    assert "openvino-bf16, openvino, onnxruntime-cpu, torch-cpu: gone; " in message
    assert message.index("gone") < message.index("no GPU here")


@pytest.mark.parametrize(
    ("sign", "cuda", "remedy"),
    [
        ("NVIDIA", None, "pip install --force-reinstall torch=="),
        ("NVIDIA", "13.0", "nvidia-smi"),
        ("JETSON", None, "install a torch for this JetPack; BUILD.md"),
    ],
)
def test_gpu_that_torch_cannot_use_is_worth_a_warning(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sign: str,
    cuda: str | None,
    remedy: str,
) -> None:
    monkeypatch.setattr(device, sign, tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with caplog.at_level(logging.WARNING):
        choose(bundle)
    assert f"although there is an NVIDIA GPU: {remedy}" in caplog.text
    with pytest.raises(BackendError, match=f"although there is an NVIDIA GPU: {remedy}"):
        choose(bundle, "tensorrt-rtx")


@pytest.mark.parametrize("error", [RuntimeError("cannot load the CPU plugin"), AttributeError("no attribute 'Core'")])
def test_continues_if_openvino_is_broken(
    bundle: Bundle, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(openvino, "import_extra", fail)
    with caplog.at_level(logging.INFO):
        assert choose(bundle).backend == "onnxruntime-cpu"
    assert f"the installed openvino is broken: {error}" in caplog.text
    with pytest.raises(BackendError, match="the installed openvino is broken"):
        choose(bundle, "openvino")


def test_named_backend_takes_the_certified_plan_if_a_certificate_is_required(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, files = [], dict(bundle.manifest.files)
    for name in ("plans/first.plan", "plans/second.plan"):
        (bundle.path / name).write_bytes(name.encode())
        files[name] = describe(bundle.path / name)
        plans.append(replace(bundle.manifest.plans[0], file=name))
    checked = {name: files[name].sha256 for name in ("tower.onnx", "tower.onnx.data", "plans/second.plan")}
    bounds = tuple(replace(bound, holds=True) for bound in made_up.bounds())
    certificate = made_up.certificate(
        backend="tensorrt-rtx", executed=("plans/second.plan",), files=checked, bounds=bounds, passed=True
    )
    manifest = replace(bundle.manifest, plans=tuple(plans), files=files, certificates=(certificate,))
    opened: list[str | None] = []
    monkeypatch.setattr(choosing, "device_obstacle", lambda _: None)
    monkeypatch.setattr(runtimes, "device_obstacle", lambda _: None)
    monkeypatch.setattr(runtimes, "capability_of", lambda _: "8.9")
    monkeypatch.setattr(
        choosing.Candidate, "open", lambda each, *_: opened.append(each.file) or SimpleNamespace(name="")
    )
    for certified in (False, True):
        choose(Bundle(bundle.path, manifest), "tensorrt-rtx", "cuda:0", certified=certified)
    assert opened == ["plans/first.plan", "plans/second.plan"]


def test_engine_options_arrive_at_the_runner(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, arrived = EngineOptions(cuda_graphs=False, contexts=2), []
    monkeypatch.setattr(tensorrt, "TensorRTRunner", lambda *a: arrived.append(a[3]))
    monkeypatch.setattr(onnxruntime, "OnnxRuntimeCudaRunner", lambda *_, cuda_graphs: arrived.append(cuda_graphs))
    monkeypatch.setattr(
        "trtower.tower.engine.choose", lambda *_, engine, **__: arrived.append(engine) or choose(bundle)
    )
    (plan,) = bundle.manifest.plans
    cuda = Candidate(
        backend="onnxruntime-cuda", file="tower.onnx", device=torch.device("cuda", 0), find_obstacle=lambda: None
    )
    replace(cuda, backend="tensorrt-rtx", file=plan.file, plan=plan).open(bundle, engine)
    cuda.open(bundle, engine)
    VisionTower.load(bundle.path, engine=engine)
    assert arrived == [engine, False, engine]
