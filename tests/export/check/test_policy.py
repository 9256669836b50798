"""What `trtower check --policy` refuses before it loads anything. tests/policies acts with LeRobot's own policies."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtower.cli import run
from trtower.errors import CheckpointError, ConfigError, MissingExtraError
from trtower_export.check.policy import check_named, load_policy


def of_precision(precision: str) -> Any:
    """Return what is read of a bundle."""
    return SimpleNamespace(path=Path("engines/x"), manifest=SimpleNamespace(precision=precision))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_eight_bits_are_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"is in {precision}, and PyTorch has no tower in 8 bits to judge"):
        check_named(of_precision(precision), tmp_path)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, r"is not a policy: its config\.json cannot be read"),
        ("[1]", r"is not a policy of LeRobot: its config\.json has no type"),
        (json.dumps({"model_type": "clip"}), r"its config\.json has no type"),
        (json.dumps({"type": "act", "input_features": {}}), r"LeRobot's policy 'act', .* ResNet"),
        (json.dumps({"type": "pi9"}), r"LeRobot's policy 'pi9', which is not compared; these are: pi0, pi05"),
    ],
)
def test_folder_without_a_policy_that_can_be_compared_is_refused(
    tmp_path: Path, config: str | None, problem: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=problem):
        check_named(of_precision("fp16"), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="LeRobot is installed")
def test_missing_lerobot_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"--policy loads the policy with LeRobot, which cannot be imported"):
        load_policy(tmp_path)


def test_observations_alone_are_refused(clip_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(clip_bundle), "--observations", "seen.safetensors"]) == 2
    assert "name its folder with --policy" in capsys.readouterr().err
