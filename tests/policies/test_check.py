"""`trtower check --policy`: the actions of a policy with a bundle in it, joint by joint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.policies.conftest import Saved
from tests.policies.small import ACTION, CAMERAS, FRAME, observe, small_pi
from trtower.bundle.bundle import Bundle
from trtower.errors import CheckpointError, ConfigError, InputError
from trtower_export.check.policy import check_policy
from trtower_export.console import LoggedProgress

pytest.importorskip("lerobot", reason="LeRobot has an environment of its own: make test-lerobot")


@pytest.fixture
def acting(saved: Saved) -> Any:
    """A policy that `from_pretrained` can make small again; π0-FAST needs a tokenizer from the hub to act."""
    if saved.kind == "pi0_fast":
        pytest.skip("its tokenizer is on the hub only")
    if saved.kind == "smolvla":
        yield saved
        return
    with small_pi(saved.kind):
        yield saved


def check(saved: Saved, head: str = "projector", observations: Path | None = None, policy: Path | None = None) -> Any:
    bundle = Bundle.open(saved.bundles[head])
    return check_policy(bundle, policy or saved.folder, observations, LoggedProgress(), backend="onnxruntime-cpu")


def record(path: Path, changes: dict[str, Any], number: int = 3) -> Path:
    held = observe(number=number) | changes
    save_file({name: value.contiguous() for name, value in held.items() if value is not None}, path)
    return path


@pytest.mark.parametrize("head", ["none", "projector"])
def test_actions_on_drawn_observations_are_the_same(acting: Saved, head: str) -> None:
    result = check(acting, head)
    assert result.passed
    assert 0 < result.relative_error < 1e-5
    assert (result.own_error, result.limit) == (None, 1e-5)
    assert [joint.name for joint in result.joints] == [str(index) for index in range(1, ACTION + 1)]
    for joint in result.joints:
        assert 0 < joint.mean <= joint.largest < 1e-4 < joint.spread
    assert result.observations == "4 drawn observations"
    assert result.policy.endswith("of lerobot 0.6.1")


def test_recorded_frames_may_be_bytes(acting: Saved, tmp_path: Path) -> None:
    frames = {
        f"observation.images.{name}": torch.randint(0, 256, (3, *FRAME, 3), dtype=torch.uint8) for name in CAMERAS
    }
    path = record(tmp_path / "seen.safetensors", frames)
    result = check(acting, observations=path)
    assert result.passed
    assert result.observations == f"3 observations of {path}"


def test_absent_camera_is_told(acting: Saved, tmp_path: Path) -> None:
    path = record(tmp_path / "seen.safetensors", {"observation.images.left": None})
    assert check(acting, observations=path).observations == f"3 observations of {path} without observation.images.left"


def test_half_precision_is_judged_by_pytorchs_own(acting: Saved, tmp_path: Path) -> None:
    from trtower_export import ExportOptions, export_tower

    options = ExportOptions(head="projector", precision="fp16", flavour="none", check=False)
    bundle = export_tower(str(acting.folder), tmp_path / "half", options)
    result = check_policy(bundle, acting.folder, None, LoggedProgress(), backend="onnxruntime-cpu")
    assert result.own_error
    assert 1e-6 < result.own_error < 1e-2
    assert result.limit == max(1e-5, 2 * result.own_error)
    assert all(joint.own for joint in result.joints)
    assert result.passed


def test_other_actions_fail(acting: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle whose features are off by a twentieth, which an installation accepts."""
    from trtower.tower.vision_tower import VisionTower

    own = VisionTower.read_tokens

    def wrong(tokens: torch.Tensor) -> torch.Tensor:
        return tokens + 0.05 * tokens.roll(1, -1)

    monkeypatch.setattr(VisionTower, "read_tokens", lambda self, images: wrong(own(self, images)))
    result = check(acting)
    assert not result.passed
    assert result.relative_error > 1e-5


def test_command_adds_the_policy_to_the_check(
    acting: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2")
    from trtower.cli import run

    bundle = str(acting.bundles["projector"])
    arguments = ["check", bundle, "--backend", "onnxruntime-cpu", "--policy", str(acting.folder)]
    assert run([*arguments, "--report", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "largest difference" in printed
    assert "passed: actions of" in printed
    assert "<h2>Actions of the policy</h2>" in (tmp_path / "report" / "report.html").read_text()
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["policy"]["passed"] is True
    assert len(result["policy"]["joints"]) == ACTION
    assert run(["check", bundle, "--observations", "seen.safetensors"]) == 2
    assert "name its folder with --policy" in capsys.readouterr().err


def test_what_does_not_fit_the_policy_is_refused(acting: Saved, tmp_path: Path) -> None:
    path = tmp_path / "seen.safetensors"
    with pytest.raises(InputError, match=r"the frames of observation\.images\.top are 32 x 24 pixels; .* 64 x 48"):
        check(acting, observations=record(path, {"observation.images.top": torch.rand(3, 3, 24, 32)}))
    with pytest.raises(InputError, match=r"has no observation\.state, which the policy reads"):
        check(acting, observations=record(path, {"observation.state": None}))
    none = {f"observation.images.{name}": None for name in CAMERAS}
    with pytest.raises(InputError, match=r"has no observation\.images\.top, .*right"):
        check(acting, observations=record(path, none))
    with pytest.raises(InputError, match=r"has observation\.images\.tpo, which the policy does not read; its cameras"):
        check(acting, observations=record(path, {"observation.images.tpo": torch.rand(3, 3, *FRAME)}))
    with pytest.raises(InputError, match=r"observation\.images\.top have values from .* to 2\d\d.*; expected 0 to 1"):
        check(acting, observations=record(path, {"observation.images.top": torch.rand(3, 3, *FRAME) * 255}))
    with pytest.raises(InputError, match=r"observation\.images\.top have values from nan"):
        check(acting, observations=record(path, {"observation.images.top": torch.full((3, 3, *FRAME), torch.nan)}))
    with pytest.raises(InputError, match=r"observation\.state has 7 numbers; the policy's config says 6"):
        check(acting, observations=record(path, {"observation.state": torch.rand(3, 7)}))
    with pytest.raises(InputError, match=r"observation\.state has NaN"):
        check(acting, observations=record(path, {"observation.state": torch.full((3, 6), torch.nan)}))
    tokens = torch.full((3, 7), 5)
    tokens[1, 1] = 9999
    with pytest.raises(InputError, match=r"has ids from 5 to 9999, but the policy knows \d+ tokens"):
        check(acting, observations=record(path, {"observation.language.tokens": tokens}))
    with pytest.raises(InputError, match=r"has \[2, 3\] of its inputs"):
        check(acting, observations=record(path, {"observation.state": torch.rand(2, 6)}))
    path.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match=r"cannot be read as safetensors .*: record it by"):
        check(acting, observations=path)
    with pytest.raises(CheckpointError, match=r"is not a policy: its config\.json cannot be read"):
        check(acting, policy=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match=r"is not a policy of LeRobot: its config\.json has no type"):
        check(acting, policy=tmp_path)
    (tmp_path / "config.json").write_text('{"type": "pi9"}')
    with pytest.raises(CheckpointError, match="'pi9', which is not compared; these are: pi0, pi05"):
        check(acting, policy=tmp_path)
    (tmp_path / "config.json").write_text('{"type": "act", "input_features": {}}')
    with pytest.raises(CheckpointError, match=r"LeRobot's policy 'act', .*ResNet"):
        check(acting, policy=tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder nobody/nothing, and as a hub id LeRobot cannot load"):
        check(acting, policy=Path("nobody/nothing"))


def test_bundle_of_another_policy_is_refused(acting: Saved, tmp_path: Path) -> None:
    from tests.policies.small import make_policy

    torch.manual_seed(0)
    other = make_policy(acting.kind, tmp_path)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="has other weights than"):
        check(acting, policy=tmp_path / "other")
