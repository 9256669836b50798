"""transformers' own π0, whose config holds that of its PaliGemma."""

from trtower_export.policies.base import Policy, PolicyTower

POLICIES = (
    Policy(
        name="pi0 model",
        is_of=lambda raw: raw.get("model_type") == "pi0",
        read=lambda raw: PolicyTower(model=raw["vlm_config"]),
        obstacle=lambda raw: (
            None
            if isinstance(raw.get("vlm_config"), dict)
            else "its config.json has no vlm_config, so it does not describe its tower"
        ),
    ),
)
