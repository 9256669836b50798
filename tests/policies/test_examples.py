"""Every example of a robot policy acts as the policy does without a bundle."""

import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import trtower
from tests.policies.conftest import Saved
from tests.policies.small import act, observe, small_pi

pytest.importorskip("lerobot", reason="LeRobot has an environment of its own: make test-lerobot")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SCRIPTS = {"pi0": "act_pi0.py", "smolvla": "act_smolvla.py"}


def test_example_acts_as_the_policy_does(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if saved.kind not in SCRIPTS:
        pytest.skip("it has no script of its own")
    observations = tmp_path / "observations.safetensors"
    save_file(observe(), observations)
    script = EXAMPLES / SCRIPTS[saved.kind]
    arguments = [script, saved.folder, saved.bundles["projector"], observations]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    install = trtower.install

    def seeded(*given: Any, **options: Any) -> Any:
        """Draw the noise of the actions after what a policy draws when it is loaded."""
        installation = install(*given, **options)
        torch.manual_seed(1)
        return installation

    monkeypatch.setattr(trtower, "install", seeded)
    with ExitStack() as sizes:
        if saved.kind != "smolvla":
            sizes.enter_context(small_pi(saved.kind))  # so not in a process of its own
        runpy.run_path(str(script))
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line and line.lstrip("-")[0].isdigit()]
    assert "projector" in printed
    actual = torch.tensor([[float(joint) for joint in row] for row in rows])
    torch.testing.assert_close(actual, act(saved.kind, saved.policy, observe())[0], rtol=0, atol=2e-4)
