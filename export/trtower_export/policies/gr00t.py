"""GR00T N1.5 and N1.6: an Eagle model, whose sizes are not in the policy's config, and a diffusion head.

N1.5 as NVIDIA and LeRobot 0.4 save it, N1.6 as NVIDIA does. Sources: `gr00t_n1.py`, `eagle_backbone.py`,
`modeling_eagle2_5_vl.py`, `gr00t_n1d6.py`, `modeling_eagle3_vl.py` and `modeling_siglip2.py` of Isaac-GR00T, and for
N1.6 the config of Eagle-Block2A-2B-v2.
"""

from trtower_export.policies.base import Policy, PolicyTower, RawConfig, side_of
from trtower_export.recipes import read_recipe

ONE_LAYER = "1mlp_nops"
"""How the name of N1.5's Eagle model ends: its projector has one layer, and shuffles no pixels."""

BLOCK2A = "nvidia/Eagle-Block2A-2B-v2"
"""The Eagle model of N1.6."""

MULTIPLE = 28
"""N1.6 rounds the sides of its frames to multiples of this: two patches, which its projector puts side by side."""

LARGEST_IMAGE = 8192

OWN_FRAMES = "GR00T crops and resizes frames by its own transforms before: pass encode frames that they have made"


def _is_n1_5(raw: RawConfig) -> bool:
    if raw.get("type") == "groot" and "model_type" not in raw:  # LeRobot 0.4; 0.6 has N1.7 only
        return "n1.5" in str(raw.get("base_model_path")).lower()
    return raw.get("model_type") == "gr00t_n1_5"


def _read_n1_5(raw: RawConfig) -> PolicyTower:
    del raw
    return PolicyTower(model=read_recipe("GR00T-N1.5-3B"), remarks=(OWN_FRAMES,))


def _n1_5_obstacle(raw: RawConfig) -> str | None:
    named = str((raw.get("backbone_cfg") or {}).get("eagle_path", ONE_LAYER))
    if ONE_LAYER in named:
        return None
    return f"its Eagle model {named!r} is none that trtower knows; it knows that of GR00T N1.5, …{ONE_LAYER}"


def _edge(raw: RawConfig) -> int:
    """Return the side of the squares that N1.6's transforms make of square frames; 0 if its config has none.

    Of its two sets of transforms, which `use_albumentations_transforms` chooses from, only one has a shorter edge.
    """
    target = side_of(raw.get("image_target_size"))
    edge = raw.get("shortest_image_edge", 256) if raw.get("use_albumentations_transforms", True) else None
    side = target if edge is None else edge
    return side if type(side) is int and MULTIPLE <= side <= LARGEST_IMAGE else 0


def _read_n1_6(raw: RawConfig) -> PolicyTower:
    side = round(_edge(raw) / MULTIPLE) * MULTIPLE
    return PolicyTower(
        model=read_recipe("GR00T-N1.6-3B"),
        image_size=side,
        remarks=(
            f"square frames, which the policy makes {_edge(raw)} pixels wide, come to its tower at {side}; an engine "
            "accepts no others, so let the policy letterbox wider frames, or name another multiple of 28 with "
            "--image-size",
            OWN_FRAMES,
        ),
    )


def _n1_6_obstacle(raw: RawConfig) -> str | None:
    if (named := raw.get("model_name", BLOCK2A)) != BLOCK2A:
        return f"its Eagle model {named!r} is none that trtower knows; it knows {BLOCK2A}"
    if not _edge(raw):
        sizes = ", ".join(f"{name}={raw.get(name)!r}" for name in ("shortest_image_edge", "image_target_size"))
        return f"its frames have no size that is known here ({sizes}); expected {MULTIPLE} to {LARGEST_IMAGE} pixels"
    return None


POLICIES = (
    Policy(name="GR00T N1.5 policy", is_of=_is_n1_5, read=_read_n1_5, obstacle=_n1_5_obstacle),
    Policy(
        name="GR00T N1.6 policy",
        is_of=lambda raw: raw.get("model_type") == "Gr00tN1d6",
        read=_read_n1_6,
        obstacle=_n1_6_obstacle,
    ),
)
