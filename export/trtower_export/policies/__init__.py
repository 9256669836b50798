"""The robot policies whose towers can be exported. To add one, write a module that defines POLICIES, and name it below.

A policy's config.json does not describe its tower: it names a model, or the policy's code holds the sizes. So each kind
of policy is read into the recipe, hub id or folder of the model that it is built on.
"""

from importlib import import_module
from pathlib import Path

from trtower.errors import CheckpointError
from trtower_export.policies.base import Policy, PolicyTower, RawConfig
from trtower_export.policies.lerobot import KNOWN, REFUSED

POLICIES: tuple[Policy, ...] = tuple(
    policy
    for name in ("openpi", "gr00t", "lerobot", "transformers")
    for policy in import_module(f"{__name__}.{name}").POLICIES
)


def find_policy(raw: RawConfig) -> Policy | None:
    """Return the kind of policy that a config is of; None if it is not of a policy that is known here."""
    return next((policy for policy in POLICIES if policy.is_of(raw)), None)


def refuse_other_policy(raw: RawConfig, folder: Path) -> None:
    """Raise CheckpointError for one of LeRobot's policies that has no row here."""
    if "type" not in raw or "model_type" in raw or "input_features" not in raw:
        return
    kind = str(raw["type"])
    reason = REFUSED.get(kind) or f"it is none that trtower knows; it knows {KNOWN}"
    raise CheckpointError(f"{folder} is LeRobot's policy {kind!r}, whose tower cannot be exported: {reason}.")


__all__ = ["POLICIES", "Policy", "PolicyTower", "RawConfig", "find_policy", "refuse_other_policy"]
