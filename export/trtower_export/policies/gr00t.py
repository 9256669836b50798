"""GR00T N1.5, as NVIDIA and LeRobot 0.4 save it: an Eagle model, whose sizes are in its code, and a diffusion head.

Sources: `gr00t_n1.py` and `eagle_backbone.py` of Isaac-GR00T, `modeling_eagle2_5_vl.py` beside them. The name of the
Eagle model in a checkpoint's config ends in "1mlp_nops": its projector has one layer, and shuffles no pixels.
"""

from trtower_export.policies.base import Policy, PolicyTower, RawConfig
from trtower_export.recipes import read_recipe

ONE_LAYER = "1mlp_nops"


def _is_of(raw: RawConfig) -> bool:
    if raw.get("type") == "groot" and "model_type" not in raw:  # LeRobot 0.4; 0.6 has N1.7 only
        return "n1.5" in str(raw.get("base_model_path")).lower()
    return raw.get("model_type") == "gr00t_n1_5"


def _read(raw: RawConfig) -> PolicyTower:
    del raw
    return PolicyTower(
        model=read_recipe("GR00T-N1.5-3B"),
        remarks=(
            "GR00T crops and resizes frames by its own transforms before: pass encode frames that they have made",
        ),
    )


def _obstacle(raw: RawConfig) -> str | None:
    named = str((raw.get("backbone_cfg") or {}).get("eagle_path", ONE_LAYER))
    if ONE_LAYER in named:
        return None
    return f"its Eagle model {named!r} is none that trtower knows; it knows that of GR00T N1.5, …{ONE_LAYER}"


POLICIES = (Policy(name="GR00T N1.5 policy", is_of=_is_of, read=_read, obstacle=_obstacle),)
