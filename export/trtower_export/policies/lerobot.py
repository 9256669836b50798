"""LeRobot's policies, as `save_pretrained` writes them: a config.json whose `type` names the policy.

Sources: `configuration_*.py` and `modeling_*.py` of LeRobot 0.4 to 0.6.
"""

from functools import partial
from typing import Any

from trtower.layer_codes import LAST
from trtower_export.policies.base import Policy, PolicyTower, RawConfig, frames, side_of
from trtower_export.policies.openpi import SIDE, pi_recipe, unmerged

KNOWN = "the policies of LeRobot 0.4 to 0.6"

PI = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "π0-FAST"}


def cameras_of(raw: RawConfig) -> int | None:
    """Count the images that a policy's config names, and those that it adds for cameras that are missing."""
    features = raw.get("input_features")
    kinds = [each.get("type") for each in features.values() if isinstance(each, dict)] if features else []
    added = raw.get("empty_cameras") or 0
    named = sum("empty_camera_" in name for name in features or ())
    return (kinds.count("VISUAL") + max(0, added - named)) or None


def remarks_of(raw: RawConfig) -> tuple[str, ...]:
    """Say what a policy's own processors do before, which no bundle does."""
    mode = (raw.get("normalization_mapping") or {}).get("VISUAL", "IDENTITY")
    if mode == "IDENTITY":
        return ()
    return (
        f"the policy's own processor normalises frames by {mode} of its dataset before: encode does not, so pass it "
        "frames that are normalised, or the policy's images to the tower",
    )


def _pi_obstacle(raw: RawConfig) -> str | None:
    if "image_resolution" not in raw:
        return (
            "its config.json has no image_resolution, as that of LeRobot before 0.4 or after what is known here; "
            f"trtower knows {KNOWN}. Load the policy with one of these and save it again with save_pretrained()"
        )
    if not side_of(raw["image_resolution"]):
        return f"its image_resolution is {raw['image_resolution']!r}; expected the side of a square, twice"
    if raw["type"] == "pi0_fast" and side_of(raw["image_resolution"]) != SIDE:
        return f"its image_resolution is {raw['image_resolution']!r}, but π0-FAST builds its tower for {SIDE} pixels"
    return unmerged(raw)


def _read_pi(raw: RawConfig) -> PolicyTower:
    side = side_of(raw["image_resolution"])
    return PolicyTower(
        model=pi_recipe(),
        config={"image_size": side},
        preprocessor=frames("lerobot", side),
        cameras=cameras_of(raw),
        remarks=remarks_of(raw),
    )


def _named_obstacle(name: str, raw: RawConfig) -> str | None:
    if isinstance(raw.get(name), str):
        return None
    return f"its config.json has no {name}, the model that its tower comes from; trtower knows {KNOWN}"


def _count_obstacle(name: str, raw: RawConfig, usual: int) -> str | None:
    number = raw.get(name, usual)
    return None if type(number) is int and number > 0 else f"its {name} is {number!r}; expected a number from 1 on"


def _smolvla_obstacle(raw: RawConfig) -> str | None:
    if reason := _named_obstacle("vlm_model_name", raw):
        return reason
    if not side_of(raw.get("resize_imgs_with_padding")):
        return (
            f"its resize_imgs_with_padding is {raw.get('resize_imgs_with_padding')!r}, so its tower reads frames that "
            "are not squares of one size; an engine accepts only those"
        )
    return None


def _read_smolvla(raw: RawConfig) -> PolicyTower:
    side = side_of(raw["resize_imgs_with_padding"])
    return PolicyTower(
        model=str(raw["vlm_model_name"]),
        named_by="vlm_model_name",
        image_size=side,
        preprocessor=frames("smolvla", side),
        cameras=cameras_of(raw),
        remarks=(
            "SmolVLA multiplies what its connector returns by the root of its width, in embed_prefix: a bundle with a "
            "head holds the connector's own features, and the policy's code still multiplies them",
            *remarks_of(raw),
        ),
    )


def _evo1_obstacle(raw: RawConfig) -> str | None:
    if not side_of(raw.get("image_resolution")):
        return f"its image_resolution is {raw.get('image_resolution')!r}; expected the side of a square, twice"
    return _count_obstacle("max_views", raw, 3) or _named_obstacle("vlm_model_name", raw)


def _read_evo1(raw: RawConfig) -> PolicyTower:
    side = side_of(raw["image_resolution"])
    return PolicyTower(
        model=str(raw["vlm_model_name"]),
        named_by="vlm_model_name",
        image_size=side,
        cameras=raw.get("max_views", 3),
        remarks=remarks_of(raw),
    )


def _dit_side(raw: RawConfig) -> int:
    """Return the side of the frames that multi-task DiT's encoder gets; 0 if they are no squares."""
    shape = raw.get("image_crop_shape") or raw.get("image_resize_shape")
    return side_of(shape) if shape else 0


def _dit_obstacle(raw: RawConfig) -> str | None:
    if not _dit_side(raw):
        return (
            f"its image_crop_shape is {raw.get('image_crop_shape')!r} and its image_resize_shape "
            f"{raw.get('image_resize_shape')!r}, so its tower does not read frames that are squares of one size; an "
            "engine accepts only those"
        )
    return _count_obstacle("n_obs_steps", raw, 1) or _named_obstacle("vision_encoder_name", raw)


def _read_dit(raw: RawConfig) -> PolicyTower:
    side, resized = _dit_side(raw), raw.get("image_resize_shape")
    scaled = {"height": resized[0], "width": resized[1]} if resized else None
    square = {"height": side, "width": side}
    return PolicyTower(
        model=str(raw["vision_encoder_name"]),
        named_by="vision_encoder_name",
        image_size=side,
        families=("clip",),
        reads=(LAST, "cls_patch"),
        preprocessor={
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": scaled is not None,
            "size": scaled or square,
            "resample": 2,
            "crop_size": square,
            "crop_like": "torchvision",
            "do_normalize": False,
        },
        cameras=(cameras_of(raw) or 1) * raw.get("n_obs_steps", 1),
        remarks=(
            "the policy reads the CLS token, the first of those that the tower returns",
            *remarks_of({"normalization_mapping": {"VISUAL": "MEAN_STD"}} | dict(raw)),  # LeRobot's default for it
        ),
    )


def _is_of(kind: str, raw: RawConfig) -> bool:
    return raw.get("type") == kind and "model_type" not in raw


def _policy(kind: str, name: str, **others: Any) -> Policy:
    return Policy(name=f"{name} policy of LeRobot", is_of=partial(_is_of, kind), **others)


POLICIES = (
    *(_policy(kind, name, read=_read_pi, obstacle=_pi_obstacle) for kind, name in PI.items()),
    _policy("smolvla", "SmolVLA", read=_read_smolvla, obstacle=_smolvla_obstacle),
    _policy("evo1", "EVO-1", read=_read_evo1, obstacle=_evo1_obstacle),
    _policy("multi_task_dit", "multi-task DiT", read=_read_dit, obstacle=_dit_obstacle),
)

_QWEN = "its tower is Qwen's, which accepts pictures of any shape, an engine only one"
_RESNET = "it reads its cameras with a ResNet, which is not a vision transformer"
_SMALL = "it reads its cameras with a small convolutional network, which is not a vision transformer"
REFUSED = {
    "act": _RESNET,
    "diffusion": _RESNET,
    "vqbet": _RESNET,
    "tdmpc": _SMALL,
    "sac": _SMALL,
    "gaussian_actor": _SMALL,
    "eo1": _QWEN,
    "wall_x": _QWEN,
    "vla_jepa": _QWEN,
    "groot": "its tower is that of GR00T N1.7, Qwen's, which accepts pictures of any shape, an engine only one",
    "xvla": "its tower is Florence-2's DaViT, which mixes windows and channels; trtower exports plain ViTs",
    "molmoact2": "its tower is Molmo's, which trtower does not export",
    "fastwam": "it reads its cameras with Wan's video autoencoder, which is not a vision transformer",
    "lingbot_va": "it reads its cameras with Wan's video autoencoder, which is not a vision transformer",
}
"""Why the towers of LeRobot's other policies cannot be exported, by the `type` of their config."""
