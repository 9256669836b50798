"""The requested backend runs, or an error says why not."""

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trtower import Bundle, VisionTower
from trtower.errors import BackendError, BundleError, ConfigError, MissingExtraError
from trtower.extras import how_to_install
from trtower.flavour import load_flavour
from trtower.inspection import inspect_bundle
from trtower.names import list_choices
from trtower.runners import choose as choosing
from trtower.runners import runtimes, tensorrt
from trtower.runners.choose import candidates

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="covers machines without a GPU")


@without_cuda
def test_auto_logs_its_choice_and_why_better_backends_do_not_run(
    clip_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="trtower"):
        VisionTower.load(clip_bundle)
    (line,) = [record.getMessage() for record in caplog.records if "runs on" in record.getMessage()]
    for part in (
        "openvino",
        "CPU",
        "passed over tensorrt:",
        "tensorrt-rtx, torch-cuda, onnxruntime-cuda: no GPU here",
    ):
        assert part in line


@without_cuda
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"])
def test_named_backend_that_cannot_run_raises(clip_bundle: Path, backend: str) -> None:
    with pytest.raises(BackendError, match=f"{backend}: "):
        VisionTower.load(clip_bundle, backend=backend)


@without_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_cuda_does_not_fall_back_to_the_cpu(clip_bundle: Path, device: str) -> None:
    with pytest.raises(BackendError, match=r"cannot use device cuda:0: no GPU here.*Pass device='cpu'"):
        VisionTower.load(clip_bundle, device=device)


def test_tower_is_not_moved_to_a_device_without_a_backend(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle)
    with pytest.raises(ConfigError, match="'meta' has no backend"):
        tower.to("meta")


def test_moved_tower_is_opened_on_the_new_device(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, done = VisionTower.load(clip_bundle), list[object]()

    def open_there(device: torch.device) -> Callable[[], None]:
        done.append(device)
        return lambda: done.append("the previous runner is closed")

    monkeypatch.setattr(tower._engine, "open", open_there)
    torch.nn.ModuleDict({"vision_tower": tower}).to("meta")
    assert done == [torch.device("meta"), "the previous runner is closed"]


@pytest.mark.parametrize(
    ("backend", "meant"),
    [
        ("cuda", "'tensorrt', 'tensorrt-rtx', 'torch-cuda' or 'onnxruntime-cuda'"),
        ("gpu", "'tensorrt', 'tensorrt-rtx', 'torch-cuda' or 'onnxruntime-cuda'"),
        ("cpu", "'openvino', 'torch-cpu' or 'onnxruntime-cpu'"),
        ("trt", "'tensorrt'"),
        ("onnx", "'onnxruntime'"),
        ("pytorch", "'torch'"),
        ("tensorrt_rtx", "'tensorrt-rtx'"),
        ("OpenVINO", "'openvino'"),
        ("opnvino", "'openvino' or 'openvino-int8'"),
    ],
)
def test_unknown_backend_names_the_nearest_first(clip_bundle: Path, backend: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VisionTower.load(clip_bundle, backend=backend)
    choices = list_choices(choosing.backend_names())
    assert str(caught.value) == f"unknown backend {backend!r}; did you mean {meant}? choose {choices}."


@pytest.mark.parametrize("backend", ["spam", "", None, 3])
def test_unknown_backend_that_resembles_none_lists_all(clip_bundle: Path, backend: object) -> None:
    with pytest.raises(ConfigError, match=rf"^unknown backend {backend!r}; choose auto, tensorrt, .* or torch-cpu\.$"):
        VisionTower.load(clip_bundle, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "unknown device 'tpu'; choose cpu, cuda or cuda:INDEX."),
        ("gpu", "unknown device 'gpu'; did you mean 'cuda'? choose cpu, cuda or cuda:INDEX."),
        ("CUDA", "unknown device 'CUDA'; did you mean 'cuda'? choose cpu, cuda or cuda:INDEX."),
        ("0", "unknown device '0'; did you mean 'cuda:0'? choose cpu, cuda or cuda:INDEX."),
        ("", "unknown device ''; choose cpu, cuda or cuda:INDEX."),
        (-1, "unknown device -1; choose cpu, cuda or cuda:INDEX."),
        (1.5, "unknown device 1.5; choose cpu, cuda or cuda:INDEX."),
        (True, "unknown device True; choose cpu, cuda or cuda:INDEX."),
        ("cuda:257", "unknown device 'cuda:257'; choose cpu, cuda or cuda:INDEX."),
        (99999, "unknown device 99999; choose cpu, cuda or cuda:INDEX."),
        ("mps", "device 'mps' has no backend; choose cpu, cuda or cuda:INDEX."),
        ("xpu", "device 'xpu' has no backend; choose cpu, cuda or cuda:INDEX."),
        (torch.device("mps"), "device 'mps' has no backend; choose cpu, cuda or cuda:INDEX."),
    ],
)
def test_device_without_a_backend_is_an_error_on_one_line(clip_bundle: Path, device: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VisionTower.load(clip_bundle, device=device)  # type: ignore[arg-type]
    assert str(caught.value) == message


@without_cuda
@pytest.mark.parametrize(("device", "index"), [(0, 0), (3, 3), ("cuda:99", 99)])
def test_number_means_a_gpu(clip_bundle: Path, device: str | int, index: int) -> None:
    with pytest.raises(BackendError, match=rf"^cannot use device cuda:{index}: no GPU here"):
        VisionTower.load(clip_bundle, device=device)  # type: ignore[arg-type]


def test_backend_that_is_not_installed_names_its_extra(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=rf"onnxruntime, which is not installed: {re.escape(how_to_install('cpu'))}"):
        VisionTower.load(clip_bundle, backend="onnxruntime-cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="covers machines without a GPU")
def test_backend_that_cannot_run_names_those_that_can(clip_bundle: Path) -> None:
    expected = (
        r"^no requested backend can run .*: tensorrt-rtx: no GPU here.*\. Available on this machine: .*openvino, onnx"
    )
    with pytest.raises(BackendError, match=expected):
        VisionTower.load(clip_bundle, backend="tensorrt-rtx")


def test_broken_backend_does_not_stop_another(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(flavour: str) -> None:
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(runtimes, "load_flavour", broken)
    for module in (choosing, runtimes):
        monkeypatch.setattr(module, "device_obstacle", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert VisionTower.load(clip_bundle, "onnxruntime-cpu").is_loaded
    (plan,) = [c for c in candidates(Bundle.open(clip_bundle)) if c.backend == "tensorrt-rtx"]
    assert plan.obstacle == "libtensorrt_rtx.so.1: cannot open shared object file"
    verdict = inspect_bundle(Bundle.open(clip_bundle)).plans[0].verdicts["version"]
    assert str(verdict).endswith(", but the installed one is broken")


def test_provider_that_onnxruntime_drops_is_an_error(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class SessionThatDroppedIt(onnxruntime.InferenceSession):  # type: ignore[misc] # it has no annotations
        def get_providers(self) -> list[str]:
            return ["AzureExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", SessionThatDroppedIt)
    with pytest.raises(BackendError, match="dropped CPUExecutionProvider without an error"):
        VisionTower.load(clip_bundle, backend="onnxruntime-cpu")


def test_bf16_does_not_run_on_the_cpu_and_says_so(export: Callable[..., Path]) -> None:
    with pytest.raises(BackendError, match="no BF16 kernels for the CPU"):
        VisionTower.load(export("clip", precision="bf16", flavour="none"), backend="onnxruntime-cpu")


def test_altered_file_is_never_passed_over(spoilt: Path) -> None:
    graph = spoilt / "tower.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleError, match="was altered"):
        VisionTower.load(spoilt, backend="auto")


def test_cpu_can_be_requested_on_a_machine_with_a_gpu(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    listed = candidates(Bundle.open(clip_bundle), "cpu")
    assert "device cpu was requested" in {each.obstacle for each in listed if each.device.type == "cuda"}
    assert all(each.obstacle for each in listed if each.device.type == "cuda")
    assert not next(each for each in listed if each.backend == "onnxruntime-cpu").obstacle


@pytest.mark.parametrize(
    ("capability", "capabilities", "expected"),
    [
        ((8, 9), (), None),
        ((8, 0), (), None),
        ((12, 9), (), None),
        ((7, 5), (), "needs compute capability 8.0 or 8.6 or 8.9 or 12.0 or 12.1 or later; this GPU has 7.5"),
        ((9, 0), (), "needs compute capability 8.0 or 8.6 or 8.9 or 12.0 or 12.1 or later; this GPU has 9.0"),
        ((8, 9), ("8.6", "12.0"), "needs compute capability 8.6 or 12.0; this GPU has 8.9"),
        ((8, 6), ("8.6", "12.0"), None),
    ],
)
def test_plan_of_another_gpu_is_passed_over_with_its_reason(
    clip_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    capabilities: tuple[str, ...],
    expected: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    bundle = Bundle.open(clip_bundle)
    object.__setattr__(bundle.manifest.plans[0], "compute_capabilities", capabilities)
    (plan,) = [c for c in candidates(bundle) if c.backend == "tensorrt-rtx"]
    assert (plan.obstacle or "").endswith(expected or "")
    assert (plan.obstacle is None) == (expected is None)


def test_plan_of_another_version_is_passed_over(clip_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(clip_bundle)
    object.__setattr__(bundle.manifest.plans[0], "version", "1.0.0")
    obstacle = tensorrt.TENSORRT_RTX.obstacle(bundle, bundle.manifest.plans[0].file, torch.device("cuda", 0))
    assert obstacle
    assert "was built by tensorrt-rtx 1.0.0, but " in obstacle


def test_type_stubs_are_not_mistaken_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingExtraError, match="only type stubs"):
        load_flavour("tensorrt")


def test_import_loads_neither_a_backend_nor_the_export_side() -> None:
    heavy = ("transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "typer", "rich", "PIL")
    code = f"import sys, trtower; print([m for m in {(*heavy, 'trtower_export')} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
