"""Which TensorRT a plan needs, and how to get it, on machines with this or that installed."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trtower.bundle.manifest import BuildSettings, PlanEntry
from trtower.errors import ConfigError, MissingExtraError
from trtower.flavour import LEAN, PLATFORM
from trtower.runners import runtimes
from trtower.runners.runtimes import plan_verdicts


def plan(version: str, *, version_compatible: bool = True, flavour: str = "tensorrt") -> PlanEntry:
    settings = BuildSettings(version_compatible=version_compatible)
    return PlanEntry(
        file="plans/a.plan",
        flavour=flavour,
        version=version,
        platform=PLATFORM,
        compute_capabilities=("8.0",),
        settings=settings,
    )


def version_verdict(monkeypatch: pytest.MonkeyPatch, entry: PlanEntry, full: str = "", lean: str = "") -> str | None:
    """Return the verdict on the version on a machine with these modules of TensorRT; "" is not installed."""

    def module(name: str, version: str) -> SimpleNamespace:
        if not version:
            raise MissingExtraError(f"{name} is missing")
        return SimpleNamespace(__name__=name, __version__=version)

    monkeypatch.setattr(runtimes, "load_flavour", lambda _: module("tensorrt", full))
    monkeypatch.setattr(runtimes, "load_lean", lambda: module(LEAN, lean))
    monkeypatch.setattr(runtimes, "capability_of", lambda _: "8.0")
    return plan_verdicts(entry, torch.device("cuda", 0))["version"]


@pytest.mark.parametrize(
    ("built", "full", "lean", "remedy"),
    [
        ("10.16.1.11", "11.4.0.106", "", "tensorrt 11.4.0.106: pip install tensorrt-lean==10.16.1.11, or run trtower"),
        ("10.16.1.11", "", "11.4.0.106", "tensorrt-lean 11.4.0.106: pip install tensorrt-lean==10.16.1.11"),
        ("10.3.0", "11.4.0.106", "", "pip install tensorrt==10.3.0, or run trtower build here"),  # lean is not on PyPI
        ("10.16.1.11", "11.4.0.106", "10.16.1.11", None),
    ],
)
def test_remedy_can_be_had(
    monkeypatch: pytest.MonkeyPatch, built: str, full: str, lean: str, remedy: str | None
) -> None:
    verdict = version_verdict(monkeypatch, plan(built), full, lean)
    if remedy is None:
        assert verdict is None
    else:
        assert remedy in str(verdict)
        assert str(verdict).endswith("trtower build here") == bool(full)


def test_jetson_takes_no_tensorrt_from_pypi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtimes, "JETSON", tmp_path)
    verdict = version_verdict(monkeypatch, plan("10.3.0", version_compatible=False), "10.16.2.10")
    assert str(verdict).endswith("but this machine has tensorrt 10.16.2.10: run trtower build here")


def test_jetson_with_the_lean_runtime_only_builds_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtimes, "JETSON", tmp_path)
    verdict = version_verdict(monkeypatch, plan("10.16.1.11"), "", "11.4.0.106")
    assert str(verdict).endswith("tensorrt-lean 11.4.0.106: run trtower build where the whole TensorRT is")
    rtx = version_verdict(monkeypatch, plan("1.7.1.116", version_compatible=False, flavour="tensorrt-rtx"), "1.6.1.120")
    assert "pip install tensorrt-rtx==1.7.1.116, or " in str(rtx)


def test_plan_of_tensorrt_rtx_is_not_for_the_lean_runtime() -> None:
    with pytest.raises(ConfigError, match=r"plans/a.plan is version-compatible, which plans of tensorrt-rtx cannot be"):
        plan("1.7.1.116", flavour="tensorrt-rtx")
