"""Known faults of TensorRT stop an export or a build, unless they are accepted by name."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_model
from trtower.bundle.manifest import BUILD_NOTES
from trtower.bundle.suggest import export_command
from trtower.cli import run
from trtower.errors import ConfigError
from trtower.flavour import is_before
from trtower.spec import PRECISIONS
from trtower_export.families import FAMILIES
from trtower_export.options import ExportOptions
from trtower_export.pipeline import export_tower
from trtower_export.targets import find_target
from trtower_export.targets.faults import all_faults, check_faults


def warnings(target: str, family: str, precision: str = "fp16", accepted: tuple[str, ...] = ()) -> list[str]:
    """Check a target and return what was warned of."""
    said: list[str] = []
    check_faults(*find_target(target).where, family, precision, accepted, said.append)
    return said


def test_every_row_is_complete_and_says_where_it_was_read() -> None:
    for fault in all_faults():
        assert re.fullmatch(r"https://\S+", fault.source)
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", fault.read)
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?", fault.since)
        assert {*fault.families} <= {family.name for family in FAMILIES}
        assert {*fault.precisions} <= PRECISIONS.keys()
        assert fault.what
        assert fault.instead


@pytest.mark.parametrize("target", ["jetpack-6.1", "jetpack-6.2", "triton-24.08", "triton-24.09", "tensorrt-10.3"])
def test_dinov3_is_refused_where_it_was_reported_wrong(target: str) -> None:
    with pytest.raises(ConfigError, match=r"dinov3-on-10.3.*issues/\d+.*--accept-known-fault dinov3-on-10.3"):
        warnings(target, "dinov3_vit")
    assert any("dinov3-on-10.3" in line for line in warnings(target, "dinov3_vit", accepted=("dinov3-on-10.3",)))
    assert not any("dinov3" in line for line in warnings(target, "clip"))


@pytest.mark.parametrize("target", ["triton-24.11", "triton-25.12", "tensorrt-11.4", "jetpack-7.2", "h100"])
def test_later_versions_and_unknown_ones_take_dinov3(target: str) -> None:
    assert not any("dinov3" in line for line in warnings(target, "dinov3_vit"))


def test_orin_is_refused_where_tensorrt_has_no_kernels_for_it() -> None:
    def check(version: str, *capabilities: str) -> None:
        check_faults(version, capabilities, "linux-aarch64", "clip", "fp16", (), lambda _: None)

    with pytest.raises(ConfigError, match=r"no kernels for compute capability 8.7"):
        check("10.13.3", "8.7")
    check("10.13.3", "11.0")
    check("10.3.0", "8.7")
    check("10.16.2", "8.7")


@pytest.mark.parametrize(
    ("capability", "first"), [("12.0", "10.8"), ("10.0", "10.8"), ("11.0", "10.13.2"), ("9.0", "10.3")]
)
def test_gpu_needs_a_tensorrt_that_knows_it(capability: str, first: str) -> None:
    for version in ("10.3", "10.7", "10.8", "10.11", "10.13.2", "10.14"):
        arguments = (version, (capability,), "linux-aarch64", "clip", "fp32", (), lambda _: None)
        if is_before(version, first):
            with pytest.raises(ConfigError, match=r"the build for .* fails"):
                check_faults(*arguments)
        else:
            check_faults(*arguments)


@pytest.mark.parametrize(
    ("capabilities", "platform"), [(("8.7", "11.0"), "linux-aarch64"), ((), "linux-aarch64"), (("8.7",), "")]
)
def test_fault_that_may_not_hit_is_a_warning(capabilities: tuple[str, ...], platform: str) -> None:
    said: list[str] = []
    check_faults("10.13.3", capabilities, platform, "clip", "fp16", (), said.append)
    assert any("orin-on-10.13.3" in line for line in said)


def test_report_about_another_form_of_graph_is_a_warning() -> None:
    assert any("sdpa-before-10.8" in line for line in warnings("triton-24.11", "siglip"))
    assert not any("sdpa" in line for line in warnings("triton-25.01", "siglip"))


def test_faults_are_of_data_centre_tensorrt_only() -> None:
    assert warnings("rtx-5090", "clip") == []
    for precision in ("fp16", "bf16", "fp8", "int8"):  # attention is in FP16 in 8-bit bundles, too
        with pytest.raises(ConfigError, match="fused-attention-sm120"):
            check_faults("10.16.1", ("12.0",), "linux-x86_64", "clip", precision, (), lambda _: None)
    check_faults("10.16.1", ("12.0",), "linux-x86_64", "clip", "fp32", (), lambda _: None)


def test_export_stops_before_it_loads_weights(tmp_path: Path) -> None:
    source = tmp_path / "dinov3"
    make_model("dinov3_vit").save_pretrained(source)
    options: dict[str, Any] = {"target": "jetpack-6.2", "check": False}
    with pytest.raises(ConfigError, match=r"dinov3-on-10\.3"):
        export_tower(str(source), tmp_path / "bundle", ExportOptions(**options))
    assert [*tmp_path.iterdir()] == [source]
    accepted = ExportOptions(**options, accept_known_faults=("dinov3-on-10.3",))
    bundle = export_tower(str(source), tmp_path / "bundle", accepted)
    assert bundle.manifest.target
    assert bundle.manifest.target.accept_known_faults == ("dinov3-on-10.3",)
    notes = (bundle.path / BUILD_NOTES).read_text(encoding="utf-8")
    assert "trtower build bundle --flavour tensorrt --accept-known-fault dinov3-on-10.3\n" in notes
    _, *arguments = shlex.split(export_command(bundle, -1, 56))
    assert run([*arguments, "--no-check"]) == 0
