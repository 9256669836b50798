"""`auto` takes the fastest backend that keeps the bounds, as far as the bundle's certificates say."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.export import made_up
from trtower import Bundle, VisionTower
from trtower.bundle import locked
from trtower.errors import BackendError
from trtower.runners import choose as choosing
from trtower.runners.choose import candidates, choose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens where there is no GPU")


@pytest.fixture(autouse=True)
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every processor for one with BF16: OpenVINO computes in FP32 where there is none."""
    monkeypatch.setattr(choosing, "has_bf16", lambda _: True)


@pytest.fixture
def bundle(spoilt: Path) -> Bundle:
    return Bundle.open(spoilt)


def certify(bundle: Bundle, backend: str, *, passed: bool = True) -> Bundle:
    """Write a certificate of the graph as it is."""
    files = {name: bundle.manifest.files[name].sha256 for name in ("tower.onnx", "tower.onnx.data")}
    bounds = tuple(replace(bound, holds=passed) for bound in made_up.bounds())
    certificate = made_up.certificate(backend=backend, files=files, bounds=bounds, passed=passed)
    with locked(bundle.path):
        return bundle.add_certificate(certificate)


def test_takes_openvino_in_fp32_for_fp16(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose(bundle).backend == "openvino"
    assert (
        "openvino-bf16: it computes in BF16, which is coarser than fp16, and no check vouches for it: trtower check "
        f"{bundle.path} --backend openvino-bf16" in caplog.text
    )


def test_takes_bf16_where_a_check_vouches_for_it(bundle: Bundle) -> None:
    assert choose(certify(bundle, "openvino-bf16")).backend == "openvino-bf16"


def test_check_of_other_files_vouches_for_nothing(bundle: Bundle) -> None:
    certified = certify(bundle, "openvino-bf16")
    files = {**certified.manifest.files, "tower.onnx": replace(certified.manifest.files["tower.onnx"], sha256="0" * 64)}
    (found,) = (
        each
        for each in candidates(Bundle(bundle.path, replace(certified.manifest, files=files)))
        if each.backend == "openvino-bf16"
    )
    assert "no check vouches for it" in (found.reservation or "")


def test_passes_over_what_missed_its_bounds(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    failed = certify(bundle, "openvino", passed=False)
    with caplog.at_level(logging.INFO):
        assert choose(failed).backend == "onnxruntime-cpu"
    assert f"openvino: its check of {made_up.certificate().date} missed " in caplog.text


def test_takes_what_missed_its_bounds_where_nothing_else_runs_and_warns(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    for backend in ("openvino", "onnxruntime-cpu", "openvino-bf16"):
        bundle = certify(bundle, backend, passed=False)
    tower = VisionTower.load(bundle.path)
    assert tower.backend.endswith(", CPU, FP32")  # and not BF16, which is coarser
    assert "failed its check on openvino" in caplog.text


def test_takes_what_is_certified_where_that_is_required(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    certify(bundle, "onnxruntime-cpu")
    assert choose(Bundle.open(bundle.path)).backend == "openvino"
    with caplog.at_level(logging.INFO):
        assert choose(Bundle.open(bundle.path), certified=True).backend == "onnxruntime-cpu"
    assert f"openvino: no check vouches for it: trtower check {bundle.path} --backend openvino" in caplog.text


def test_named_backend_runs_whatever_a_check_said(bundle: Bundle) -> None:
    assert choose(certify(bundle, "openvino", passed=False), "openvino").backend == "openvino"
    assert choose(bundle, "openvino-bf16").backend == "openvino-bf16"


def test_says_everything_that_stood_against_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, export: Callable[..., Path]
) -> None:
    monkeypatch.setattr(choosing, "import_extra", lambda *_, **__: (_ for _ in ()).throw(ImportError("gone")))
    with pytest.raises(BackendError) as failure:
        choose(bundle)
    for backend in ("tensorrt-rtx", "onnxruntime-cuda", "openvino-bf16", "openvino", "onnxruntime-cpu"):
        assert str(failure.value).count(f"{backend}: ") == 1
