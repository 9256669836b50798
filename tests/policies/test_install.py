"""`trtower.install` in LeRobot's own policies: the same actions, with all cameras in one engine call."""

from typing import Any

import pytest
import torch

import trtower
from tests.policies.conftest import Saved
from tests.policies.small import CAMERAS, STATE, act, make_policy, observe
from trtower.errors import ConfigError
from trtower.installation.find import find_tower

pytest.importorskip("lerobot", reason="LeRobot has an environment of its own: make test-lerobot")

CPU: dict[str, Any] = {"backend": "onnxruntime-cpu"}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def run(saved: Saved, head: str, batch: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """Return the actions of a policy with a bundle in it, and the batch of every engine call."""
    calls: list[int] = []
    with trtower.install(saved.policy, saved.bundles[head], **CPU) as installation:
        installation.tower.on_batch = lambda report: calls.append(report.batch)
        return act(saved.kind, saved.policy, batch), calls


@pytest.mark.parametrize("head", ["none", "projector"])
def test_actions_are_those_of_the_eager_policy(saved: Saved, head: str) -> None:
    expected = act(saved.kind, saved.policy, observe())
    actions, calls = run(saved, head, observe())
    assert calls == [len(CAMERAS)]
    assert relative(actions, expected) < 1e-5
    assert torch.equal(act(saved.kind, saved.policy, observe()), expected)


def test_cameras_matter(saved: Saved) -> None:
    """The other tests would pass on a policy whose actions do not depend on what it sees."""
    others = observe()
    others["observation.images.left"] = 1 - others["observation.images.left"]
    seen, other = (act(saved.kind, saved.policy, batch) for batch in (observe(), others))
    assert relative(other, seen) > 1e-4


@pytest.mark.parametrize("number", [1, 2])
def test_missing_cameras_are_not_run_and_change_nothing(saved: Saved, number: int) -> None:
    batch = observe(CAMERAS[:1], number)
    expected = act(saved.kind, saved.policy, batch)
    actions, calls = run(saved, "projector", batch)
    assert calls == [number]
    assert relative(actions, expected) < 1e-5


def test_observations_of_several_robots_run_together(saved: Saved) -> None:
    batch = observe(number=2)
    expected = act(saved.kind, saved.policy, batch)
    actions, calls = run(saved, "projector", batch)
    assert sum(calls) == 2 * len(CAMERAS)  # in pieces, for the profile ends at the policy's cameras
    assert relative(actions, expected) < 1e-5


def test_policy_is_as_before_once_the_bundle_is_out(saved: Saved) -> None:
    before = {name: set(vars(module)) for name, module in saved.policy.named_modules()}
    trtower.install(saved.policy, saved.bundles["projector"], **CPU).uninstall()
    assert {name: set(vars(module)) for name, module in saved.policy.named_modules()} == before


def test_half_precision_is_within_the_policys_own_error(saved: Saved, tmp_path: Any) -> None:
    """In FP16, actions differ from FP32's by no more than twice what they differ with the eager tower in FP16."""
    from trtower_export import ExportOptions, export_tower

    options = ExportOptions(head="projector", precision="fp16", flavour="none", check=False)
    export_tower(str(saved.folder), tmp_path / "half", options)
    expected = act(saved.kind, saved.policy, observe())
    eager = find_tower(saved.policy).module
    before = {name: weight.clone() for name, weight in eager.state_dict().items()}
    eager.half()
    hooks = [
        eager.register_forward_pre_hook(_to_half, with_kwargs=True),
        eager.register_forward_hook(lambda module, args, output: _to_float(output)),
    ]
    try:
        own = relative(act(saved.kind, saved.policy, observe()), expected)
    finally:
        for hook in hooks:
            hook.remove()
        eager.float().load_state_dict(before)
    with trtower.install(saved.policy, tmp_path / "half", **CPU):
        actual = relative(act(saved.kind, saved.policy, observe()), expected)
    assert actual <= max(2 * own, 1e-4), (actual, own)


def _to_half(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    del module
    halves = [each.half() if isinstance(each, torch.Tensor) else each for each in args]
    return tuple(halves), {name: value.half() if name == "pixel_values" else value for name, value in kwargs.items()}


def _to_float(output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state.float()
    return output


def test_other_image_size_is_refused_and_the_policy_stays(saved: Saved, tmp_path: Any) -> None:
    if saved.kind == "pi0_fast":
        pytest.skip("its code has one size only")
    field = "resize_imgs_with_padding" if saved.kind == "smolvla" else "image_resolution"
    size: dict[str, Any] = {field: (32, 32)}
    other = make_policy(saved.kind, tmp_path, CAMERAS, **size)
    expected = act(saved.kind, other, observe())
    with pytest.raises(ConfigError, match=r"accepts images of \d+ pixels; .* of this model accepts 32"):
        trtower.install(other, saved.bundles["projector"], allow_other_weights=True, **CPU)
    assert torch.equal(act(saved.kind, other, observe()), expected)


def test_policy_in_training_mode_is_refused(saved: Saved) -> None:
    find_tower(saved.policy).module.train()
    try:
        with pytest.raises(ConfigError, match="is in training mode"):
            trtower.install(saved.policy, saved.bundles["projector"], **CPU)
    finally:
        saved.policy.eval()


def test_policy_of_another_version_is_refused(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "embed_prefix_fast" if saved.kind == "pi0_fast" else "embed_prefix"
    monkeypatch.setattr(type(saved.policy.model), method, lambda self, pictures: pictures)
    with pytest.raises(
        ConfigError, match=rf"of lerobot 0\.\d.* has no {method}\(images, img_masks\).*LeRobot 0\.6, the code of 0\.4"
    ):
        trtower.install(saved.policy, saved.bundles["projector"], **CPU)


def test_policy_without_a_vision_transformer_is_refused() -> None:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    config = ACTConfig(
        input_features={
            "observation.images.top": PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64)),
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(STATE,)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(4,))},
        pretrained_backbone_weights=None,
        device="cpu",
    )
    with pytest.raises(ConfigError, match="ACTPolicy has no vision tower"):
        trtower.install(ACTPolicy(config), "anywhere", **CPU)
