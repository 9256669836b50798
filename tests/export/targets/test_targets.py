"""The table of deployments, and what an export makes of one."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BUILD_NOTES, MANIFEST, Deployment, Manifest
from trtower.cli import run
from trtower.errors import BackendError, ConfigError
from trtower.flavour import PLATFORM, is_before
from trtower_export.console import LoggedProgress
from trtower_export.listings import targets
from trtower_export.options import ExportOptions
from trtower_export.pipeline import export_tower
from trtower_export.plan import choice, deployment
from trtower_export.plan.build import add_plan
from trtower_export.plan.deployment import choose_first_plan
from trtower_export.targets import all_targets, find_target

EXPECTED = (
    *("jetpack-6.2", "jetpack-7.1", "jetpack-7.2", "tensorrt-10.16", "tensorrt-11.4", "rtx-4090", "l4", "a100", "h100"),
    *("t4", "orin", "thor", *(f"triton-24.{month:02}" for month in range(8, 13))),
    *(f"triton-25.{month:02}" for month in range(1, 13)),
)

Export = Callable[..., Bundle]


@pytest.fixture
def export_for(checkpoints: dict[str, Path], tmp_path: Path) -> Export:
    """Return a function that exports the small CLIP, or another tower, for a target."""

    def export(target: str, tower: str = "clip", **options: Any) -> Bundle:
        settings = ExportOptions(target=target, check=False, **options)
        return export_tower(str(checkpoints[tower]), tmp_path / "bundle", settings)

    return export


def test_every_row_is_complete_and_says_where_it_was_read() -> None:
    names = [target.name for target in all_targets()]
    assert {*EXPECTED} <= {*names}
    assert len({*names}) == len(names)
    for target in all_targets():
        assert target.title
        assert re.fullmatch(r"https://\S+", target.source)
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", target.read)
        assert re.fullmatch(r"(\d+\.\d+(\.\d+)?)?", target.tensorrt)
        assert target.platform in ("", "linux-x86_64", "linux-aarch64")
        assert all(re.fullmatch(r"\d+\.\d", each) for each in target.compute_capabilities)
        assert target.flavour == "tensorrt" or not target.tensorrt
        assert target.tensorrt or target.compute_capabilities


def test_unknown_target_names_the_nearest() -> None:
    for name, nearest in (("jetpak-6.2", "'jetpack-6.2'"), ("RTX_4090", "'rtx-4090'"), ("triton-23.01", "'triton-")):
        with pytest.raises(ConfigError, match=rf"unknown target '{name}'; did you mean .*{nearest}.*trtower targets"):
            find_target(name)
    with pytest.raises(ConfigError, match="unknown target 'tpu'; `trtower targets` lists them all"):
        find_target("tpu")


@pytest.mark.parametrize(
    ("version", "other", "expected"),
    [("10.3.0", "10.3", False), ("10.3", "10.10", True), ("10.16.1.11", "10.16.1", False), ("8.6.2", "10.0", True)],
)
def test_versions_compare_as_numbers_as_far_as_both_are_written(version: str, other: str, expected: bool) -> None:
    assert is_before(version, other) == expected


def test_gpu_that_tensorrt_rtx_supports_gets_its_plan_at_once(export_for: Export) -> None:
    bundle = export_for("l4")
    (plan,) = bundle.manifest.plans
    assert (plan.flavour, plan.compute_capabilities) == ("tensorrt-rtx", ("8.9",))
    assert bundle.manifest.target
    assert (bundle.manifest.target.name, bundle.manifest.target.flavour) == ("l4", "tensorrt-rtx")


@pytest.mark.skipif(PLATFORM == "linux-aarch64", reason="dgx-spark is like this machine")
def test_plan_of_another_platform_is_built_there(export_for: Export) -> None:
    assert not export_for("dgx-spark").manifest.plans


@pytest.mark.parametrize("target", ["jetpack-6.2", "triton-24.08", "h100", "thor", "tensorrt-11.4"])
def test_other_targets_get_instructions(export_for: Export, target: str) -> None:
    bundle = export_for(target)
    assert not bundle.manifest.plans
    assert bundle.manifest.target
    assert bundle.manifest.target.name == target
    assert not bundle.altered()
    notes = (bundle.path / BUILD_NOTES).read_text(encoding="utf-8")
    row = find_target(target)
    assert all(fact in notes for fact in (f"`{target}`", row.title, row.tensorrt, row.container, row.source))
    assert "trtower build bundle --flavour tensorrt" in notes
    with pytest.raises(BackendError, match="flavour tensorrt builds on the GPU that runs the plan"):
        add_plan(bundle, "auto", (), LoggedProgress())  # not a plan of TensorRT-RTX, which would not run there


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("jetpack-6.0", {}, r"jetpack-6.0 has TensorRT 8.6.2, and trtower's graphs need 10.3 or later"),
        ("t4", {"precision": "bf16"}, r"bf16 needs compute capability 8.0 or later, and t4 has 7.5"),
        ("a100", {"precision": "fp8"}, r"fp8 needs compute capability 8.9 or later, and a100 has 8.0"),
        ("orin", {"flavour": "tensorrt-rtx"}, r"for orin is one of tensorrt, not of tensorrt-rtx: drop --flavour or "),
        ("l4", {"flavour": "tensorrt"}, r"for l4 is one of tensorrt-rtx, not of tensorrt: drop --flavour or --target"),
        ("triton-25.06", {"flavour": "tensorrt-rtx"}, r"not of tensorrt-rtx"),
        (
            "triton-25.06",
            {"precision": "fp8", "compute_capabilities": ("sm_80",)},
            r"fp8 needs .* triton-25.06 has 8.0",
        ),
        ("triton-26.05", {"compute_capabilities": ("12.0",)}, r"known fault, fused-attention-sm120"),
        ("triton-25.06", {"compute_capabilities": ("8",)}, r"'8' is not a compute capability; did you mean 8.0"),
        ("tpu", {}, "unknown target 'tpu'"),
        ("l4", {"accept_known_faults": ("nothing",)}, "unknown fault 'nothing'"),
    ],
)
def test_target_refuses_what_it_cannot_run(
    export_for: Export, tmp_path: Path, target: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_for(target, **options)
    assert not [*tmp_path.iterdir()]


def test_target_with_a_gpu_excludes_another() -> None:
    with pytest.raises(
        ConfigError, match=r"--target l4 has compute capability 8.9, not 7.5: drop --compute-capability"
    ):
        choose_first_plan(ExportOptions(target="l4", compute_capabilities=("8.9", "7.5")))


def test_target_with_several_gpus_takes_one_of_them() -> None:
    with pytest.raises(ConfigError, match=r"and jetpack-7.2 has 8.7: for 11.0 only, add --compute-capability 11.0\.$"):
        choose_first_plan(ExportOptions(target="jetpack-7.2", precision="fp8"))
    target, plan, _ = choose_first_plan(
        ExportOptions(target="jetpack-7.2", precision="fp8", compute_capabilities=("11.0",))
    )
    assert target
    assert (target.compute_capabilities, plan) == (("11.0",), None)


def test_target_without_a_gpu_takes_one(export_for: Export) -> None:
    bundle = export_for("triton-25.06", compute_capabilities=("sm_80",))
    assert not bundle.manifest.plans
    assert "compute capability 8.0" in (bundle.path / BUILD_NOTES).read_text(encoding="utf-8")


@pytest.mark.parametrize(("version", "here"), [("10.16.1.11", True), ("10.15.1", False), ("10.17", False)])
def test_plan_is_built_here_if_this_machine_is_the_target(
    monkeypatch: pytest.MonkeyPatch, version: str, here: bool
) -> None:
    module = type("tensorrt", (), {"__version__": version})
    for place in (choice, deployment):
        monkeypatch.setattr(place, "capability_of", lambda *_: "9.0")
    monkeypatch.setattr(choice, "load_flavour", lambda _: module)
    monkeypatch.setattr(choice, "import_extra", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def choose(target: str, flavour: str = "auto") -> tuple[choice.PlanChoice | None, str]:
        return choose_first_plan(ExportOptions(target=target, flavour=flavour))[1:]

    chosen, reason = choose("tensorrt-10.16")
    assert bool(chosen) == here
    assert here or BUILD_NOTES in reason
    assert choose("h100")[0]
    assert "because this GPU has compute capability 9.0" in choose("a100")[1]
    assert not choose("thor")[0]
    assert PLATFORM == "linux-aarch64" or not choose("gh200")[0]
    with pytest.raises(
        ConfigError, match=r"no plan for thor can be built here, because (it is linux-aarch64|this GPU)"
    ):
        choose("thor", "tensorrt")


def test_targets_are_found_by_a_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert targets("Triton-25.0") == 0
    printed = capsys.readouterr().out
    assert "triton-25.06: read on 20" in printed
    assert "jetpack" not in printed
    assert targets("l4", json_=True) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["l4", "l40s"]
    with pytest.raises(ConfigError, match="unknown target 'orrin'; did you mean 'orin'"):
        targets("orrin")


def test_export_ends_with_the_next_step(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, step in (("jetpack-6.2", f"(jetpack-6.2): {tmp_path}/jetpack-6.2/{BUILD_NOTES}"), ("l4", "Load it:")):
        out = ["--out", str(tmp_path / target)]
        assert run(["export", str(checkpoints["clip"]), "--no-check", "--target", target, *out]) == 0
        assert step in capsys.readouterr().out
    assert run(["inspect", str(tmp_path / "jetpack-6.2"), "--why"]) == 0
    says = capsys.readouterr().out
    assert f"has no tensorrt plan; it is for jetpack-6.2: see {tmp_path}/jetpack-6.2/{BUILD_NOTES}" in says
    assert "has no tensorrt-rtx plan; it is for jetpack-6.2, which takes tensorrt" in says
    assert "trtower build" not in says  # with another TensorRT than the target's


def test_build_makes_the_plan_of_the_target(export_for: Export) -> None:
    bundle = export_for("l4", flavour="none")
    assert not bundle.manifest.plans
    (plan,) = Bundle.open(add_plan(bundle, "auto", (), LoggedProgress()).parent.parent).manifest.plans
    assert (plan.flavour, plan.compute_capabilities) == ("tensorrt-rtx", ("8.9",))


def test_target_without_its_builder_is_exported_without_a_plan(
    export_for: Export, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(deployment, "load_builder", fail)
    with caplog.at_level(logging.INFO):
        assert not export_for("l4").manifest.plans
    assert "no plan for l4 here, because libnvinfer.so.10: cannot open" in caplog.text


def test_manifest_with_only_the_name_of_a_target_is_read(export_for: Export) -> None:
    data = json.loads((export_for("thor").path / MANIFEST).read_text())
    assert Manifest.from_json(json.dumps(data | {"target": "thor"})).target == Deployment(name="thor")
    assert Manifest.from_json(json.dumps(data | {"target": ""})).target is None


def test_targets_are_listed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert targets() == 0
    printed = capsys.readouterr().out
    assert all(target.name in printed for target in all_targets())
    assert targets(json_=True) == 0
    assert '"source": "https://' in capsys.readouterr().out
