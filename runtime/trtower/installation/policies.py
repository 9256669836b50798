"""Run all cameras of a robot policy in one engine call, and none of those that it masks.

A policy turns its images into features one by one, also those that stand for missing cameras. Its attention masks the
features of these, or its code drops them, so what they are changes no action: they are zeros here.

Shapes: B observations, C cameras, S pixels a side, N tokens of D features for each image.
"""

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import ConfigError
from trtower.installation.find import Slot
from trtower.installation.reach import modules_around

logger = logging.getLogger(__name__)

KNOWN = "LeRobot 0.6, the code of 0.4 and of openpi"


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Where a policy's code turns the images of its cameras into features.

    Attributes:
        owner: The class whose method it is, with its module.
        method: The method that gets the images and their masks.
        inner: The attribute of the owner that holds the module with `embed`.
        embed: The method that turns one image, or a batch, into features.
        images: What `method` calls the images: C of (B, 3, S, S), or (B, C, 3, S, S) if they are `stacked`.
        masks: What it calls the masks: C of (B,), or (B, C) if they are `stacked`.
        stacked: Whether the policy's own code makes one batch of all cameras, so that only the masks remain to be used.
        size: The field of the policy's config with the size of its images, as [S, S]; "" if it is the tower's own.
    """

    owner: str
    method: str = "embed_prefix"
    inner: str = "paligemma_with_expert"
    embed: str = "embed_image"
    images: str = "images"
    masks: str = "img_masks"
    stacked: bool = False
    size: str = ""


LOOPS = (
    Loop(owner="lerobot.policies.pi0.modeling_pi0.PI0Pytorch"),
    Loop(owner="lerobot.policies.pi05.modeling_pi05.PI05Pytorch"),
    Loop(owner="lerobot.policies.pi0_fast.modeling_pi0_fast.PI0FastPytorch", method="embed_prefix_fast"),
    Loop(
        owner="lerobot.policies.smolvla.modeling_smolvla.VLAFlowMatching",
        inner="vlm_with_expert",
        size="resize_imgs_with_padding",
    ),
    Loop(
        owner="lerobot.policies.evo1.internvl3_embedder.InternVL3Embedder",
        method="get_fused_image_text_embedding_batched",
        inner="model",
        embed="get_image_features",
        images="camera_images",
        masks="image_masks",
        stacked=True,
    ),
    Loop(owner="openpi.models_pytorch.pi0_pytorch.PI0Pytorch"),
    Loop(
        owner="transformers.models.pi0.modeling_pi0.PI0Model",
        inner="vlm",
        embed="get_image_features",
        images="pixel_values",
        masks="pixel_attention_mask",
        stacked=True,
    ),
)


def find_loop(model: nn.Module, place: Slot) -> tuple[nn.Module, Loop] | None:
    """Find the policy's loop around the tower at ``place``, and the module that owns it; None if none is known."""
    for module in modules_around(model, place):
        names = {f"{each.__module__}.{each.__qualname__}" for each in type(module).__mro__}
        if loop := next((loop for loop in LOOPS if loop.owner in names), None):
            return module, loop
    return None


def used_size(model: nn.Module, place: Slot) -> Any:
    """Return the size of the images that the tower gets: its own, unless the policy around it prepares another."""
    if (found := find_loop(model, place)) and found[1].size:
        owner, loop = found
        return getattr(owner.config, loop.size)
    return getattr(place.vision.config, "image_size", None)


def check_loop(model: nn.Module, place: Slot) -> None:
    """Raise ConfigError if a policy is known, but its code is not that of a version that is."""
    if not (found := find_loop(model, place)):
        return
    owner, loop = found
    method, embed = getattr(owner, loop.method, None), getattr(getattr(owner, loop.inner, None), loop.embed, None)
    if loop.method in vars(owner):  # somebody's own
        return
    if callable(method) and callable(embed) and {loop.images, loop.masks} <= {*inspect.signature(method).parameters}:
        return
    library = loop.owner.partition(".")[0]
    version = getattr(sys.modules.get(library), "__version__", "of an unknown version")
    raise ConfigError(
        f"{type(owner).__name__} of {library} {version} has no {loop.method}({loop.images}, {loop.masks}) that calls "
        f"{loop.inner}.{loop.embed}, so how it reads its cameras is not known; trtower knows {KNOWN}."
    )


def methods_together(model: nn.Module, place: Slot) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    """Yield what replaces a policy's methods so that its cameras run together: module, name and method."""
    if not (found := find_loop(model, place)):
        return
    owner, loop = found
    inner = getattr(owner, loop.inner)
    if loop.method in vars(owner) or loop.embed in vars(inner):
        logger.warning(
            "%s.%s or %s of this policy was patched, so its cameras are not run together, and masked ones still run.",
            type(owner).__name__, loop.method, loop.embed
        )  # fmt: skip
        return
    through_images, embed = getattr(owner, loop.method), getattr(inner, loop.embed)
    signature = inspect.signature(through_images)
    call = threading.local()  # threads may share a policy

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(embed)
    def embed_known(*args: Any, **kwargs: Any) -> Any:
        instead: Callable[..., Any] = getattr(call, "embed", None) or embed
        return instead(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(through_images)
    def through_images_together(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        images, masks = (given.arguments[name] for name in (loop.images, loop.masks))
        call.embed = embed_shown(embed, masks) if loop.stacked else embed_together(embed, images, masks)
        try:
            return through_images(*given.args, **given.kwargs)
        finally:
            call.embed = None

    yield inner, loop.embed, embed_known
    yield owner, loop.method, through_images_together


def embed_together(
    embed: Callable[[Tensor], Tensor], images: Sequence[Tensor], masks: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Embed C images (B, 3, S, S) in one call; return what then returns the features (B, N, D) of each of them.

    An image that is masked in every observation is not run. Images of several shapes are left to be run one by one.
    """
    shown = [image for image, mask in zip(images, masks, strict=True) if bool(mask.any())] or [*images[:1]]
    if len({(image.shape[1:], image.dtype, image.device) for image in images}) != 1:
        return embed
    features = embed(torch.cat(shown))
    parts = zip(shown, features.split([len(image) for image in shown]), strict=True)
    known = {id(image): torch.zeros_like(features[:1]).expand(len(image), -1, -1) for image in images}
    known |= {id(image): part for image, part in parts}

    def embed_image(image: Tensor) -> Tensor:
        return known[id(image)] if id(image) in known else embed(image)

    return embed_image


def embed_shown(embed: Callable[..., Any], masks: Tensor) -> Callable[..., Any]:
    """Return what embeds those of the images (B * C, 3, S, S) that ``masks`` (B, C) does not mask."""
    shown = masks.flatten().bool()

    def get_image_features(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(pixel_values) != len(shown) or bool(shown.all()) or not bool(shown.any()):
            return embed(pixel_values, *args, **kwargs)
        output = embed(pixel_values[shown.to(pixel_values.device)], *args, **kwargs)
        part: Tensor = output.pooler_output
        features = part.new_zeros(len(shown), *part.shape[1:])
        features[shown.to(part.device)] = part
        output.pooler_output = features
        return output

    return get_image_features
