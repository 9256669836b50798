"""The target of a plan is chosen before any work, or one line says where the plan can be built."""

import re
import sys
from pathlib import Path

import pytest
import torch

from trtower import Bundle
from trtower.cli import run
from trtower.errors import BackendError, ConfigError, MissingExtraError
from trtower.extras import how_to_install
from trtower.runners import device
from trtower_export.console import LoggedProgress
from trtower_export.plan import choice
from trtower_export.plan.build import add_plan
from trtower_export.plan.choice import ELSEWHERE, TOO_OLD, choose_plan, read_capabilities

UNSUPPORTED: list[str] = sorted(ELSEWHERE, key=float)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (("8.9",), ("8.9",)),
        (("89",), ("8.9",)),
        (("sm_89",), ("8.9",)),
        (("sm89",), ("8.9",)),
        (("SM_89",), ("8.9",)),
        (("compute_89",), ("8.9",)),
        (("120",), ("12.0",)),
        (("sm_90a",), ("9.0",)),
        (("8.6,8.9",), ("8.6", "8.9")),
        (("8.6, 8.9", "8.9"), ("8.6", "8.9")),
        (("8.6;8.9",), ("8.6", "8.9")),
        ((), ()),
    ],
)
def test_compute_capability_is_read_as_people_write_it(written: tuple[str, ...], read: tuple[str, ...]) -> None:
    assert read_capabilities(written) == read


@pytest.mark.parametrize(
    "written", ["", "h100", "8.9x", "8.65", "native", "-8.9", "1.0", "8.9,", "sm_10", "all", "35", "3"]
)
def test_error_on_a_wrong_compute_capability_shows_the_right_form(written: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a compute capability; write it as in --compute-capability 8\.9"):
        read_capabilities((written,))


@pytest.mark.parametrize(("written", "meant"), [("9", "9.0"), ("10", "10.0"), ("12", "12.0"), ("8,9", "8.0")])
def test_number_without_its_point_is_not_guessed(written: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean {re.escape(meant)}\?"):
        read_capabilities((written,))


@pytest.mark.parametrize("flavour", ["auto", "tensorrt-rtx"])
@pytest.mark.parametrize("capability", UNSUPPORTED)
@pytest.mark.usefixtures("no_gpu")
def test_error_on_a_gpu_without_tensorrt_rtx_names_an_alternative(capability: str, flavour: str) -> None:
    gpu, instead = ELSEWHERE[capability]
    command = "trtower build BUNDLE --flavour tensorrt"
    there = "" if instead is TOO_OLD else rf"; export with --flavour none, copy the bundle .*: {command}"
    expected = (
        rf"^compute capability {re.escape(capability)} is {gpu}, which TensorRT-RTX does not .*: {instead}{there}$"
    )
    with pytest.raises(ConfigError, match=expected):
        choose_plan(flavour, (capability,), "fp16")


@pytest.mark.usefixtures("no_gpu")
def test_alternative_is_named_before_an_installation_that_would_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    for flavour in ("auto", "tensorrt-rtx"):
        with pytest.raises(ConfigError, match="is Hopper, which TensorRT-RTX does not support"):
            choose_plan(flavour, ("sm_90",), "fp16")
    with pytest.raises(BackendError, match=r"builds on the GPU that runs the plan.*: export with --flavour none"):
        choose_plan("tensorrt", (), "fp16")


@pytest.mark.parametrize(
    ("flavour", "capabilities", "missing"),
    [
        ("tensorrt", (), ()),
        ("auto", ("9.0",), ()),
        ("auto", (), ("tensorrt_rtx",)),
        ("auto", (), ("tensorrt_rtx", "tensorrt")),
    ],
)
@pytest.mark.usefixtures("no_gpu")
def test_build_without_the_gpu_says_where_to_run_it(
    clip_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    flavour: str,
    capabilities: tuple[str, ...],
    missing: tuple[str, ...],
) -> None:
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    command = f"trtower build {clip_bundle.name} --flavour tensorrt"
    there = rf"copy {clip_bundle} to that GPU's machine, and run there: {command}$"
    with pytest.raises((BackendError, ConfigError, MissingExtraError), match=there):
        add_plan(Bundle.open(clip_bundle), flavour, capabilities, LoggedProgress())


@pytest.mark.usefixtures("no_gpu")
def test_command_for_another_machine_has_the_same_settings(
    clip_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--workspace-mib", "64", "--optimization-level", "0", "--hardware-compatible", "--version-compatible"]
    accepted = ["--accept-known-fault", "dinov3-on-10.3"]
    for asked in (["--flavour", "tensorrt"], ["--compute-capability", "9.0"]):
        assert run(["build", str(clip_bundle), *asked, *accepted, *options]) != 0
        _, _, command = capsys.readouterr().err.strip().rpartition("run there: trtower ")
        assert command.split() == ["build", clip_bundle.name, "--flavour", "tensorrt", *accepted, *options]


def test_jetson_is_told_where_its_tensorrt_is(
    clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "JETSON", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"needs the package tensorrt: JetPack brings it, for an environment "):
        add_plan(Bundle.open(clip_bundle), "tensorrt", (), LoggedProgress())


@pytest.mark.usefixtures("no_gpu")
def test_gpu_that_torch_cannot_use_is_not_sought_elsewhere(
    clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "JETSON", tmp_path)
    with pytest.raises(
        BackendError, match=r"although there is an NVIDIA GPU: install a torch for this JetPack; BUILD.md"
    ):
        add_plan(Bundle.open(clip_bundle), "tensorrt", (), LoggedProgress())


def test_data_centre_flavour_builds_for_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "load_flavour", lambda _: sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    with pytest.raises(ConfigError, match=r"of compute capability 8\.9, and not for 9\.0: export with --fl"):
        choose_plan("tensorrt", ("90", "8.9"), "fp16")
    target, _ = choose_plan("tensorrt", ("sm_89",), "fp16")
    assert target
    assert target.compute_capabilities == ("8.9",)


def test_unknown_compute_capability_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'9\.9'; choose 7\.5, 8\.0, 8\.6, 8\.9, 12\.0 or 12\.1\."):
        choose_plan("tensorrt-rtx", ("9.9",), "fp16")


def test_bf16_for_turing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bf16 needs compute capability 8\.0 or later, .* 7\.5: .*--precision fp16"):
        choose_plan("tensorrt-rtx", ("8.9", "7.5"), "bf16")
    assert choose_plan("tensorrt-rtx", ("7.5",), "fp16")[0]


def test_unknown_flavour_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"^unknown flavour 'openvino'; choose auto, none, tensorrt or tensorrt-rtx"):
        choose_plan("openvino", (), "fp16")


def test_compute_capability_without_a_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="builds no plan"):
        choose_plan("none", ("8.9",), "fp16")


def test_data_centre_flavour_needs_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "load_flavour", lambda _: sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="builds on the GPU that runs the plan"):
        choose_plan("tensorrt", (), "fp16")


@pytest.mark.parametrize(("precision", "capability"), [("bf16", (7, 5)), ("fp8", (8, 6))])
def test_data_centre_flavour_needs_a_gpu_that_has_the_format(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(choice, "load_flavour", lambda _: sys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with pytest.raises(ConfigError, match=f"{precision} needs compute capability .* for {capability[0]}"):
        choose_plan("tensorrt", (), precision)
    assert choose_plan("tensorrt", (), "fp16")[0]


@pytest.mark.parametrize(
    ("capability", "capabilities", "said"),
    [((8, 9), (), ""), ((9, 0), (), "this GPU has 9.0"), ((8, 9), ("8.6",), "needs compute capability 8.6; this GPU")],
)
def test_reason_says_that_this_gpu_cannot_run_the_plan(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], capabilities: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    target, reason = choose_plan("tensorrt-rtx", capabilities, "fp16")
    assert target
    assert said in reason
    assert ("cannot run on this machine" in reason) == bool(said)


def test_auto_without_any_tensorrt_builds_none_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    target, reason = choose_plan("auto", (), "fp16")
    assert target is None
    assert "no plan is built, because no TensorRT can build here" in reason
    assert how_to_install("trt-rtx-build") in reason
    with pytest.raises(MissingExtraError, match=re.escape(how_to_install("trt-rtx-build"))):
        choose_plan("tensorrt-rtx", (), "fp16")
    with pytest.raises(MissingExtraError, match="--compute-capability is for a plan, but no plan is built"):
        choose_plan("auto", ("8.9",), "fp16")


@pytest.mark.usefixtures("no_gpu")
def test_missing_polygraphy_is_reported_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(MissingExtraError, match=r"polygraphy.*\[build\]"):
        choose_plan("tensorrt-rtx", (), "fp16")
    target, reason = choose_plan("auto", (), "fp16")
    assert target is None
    assert "polygraphy" in reason
