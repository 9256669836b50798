"""The surface that model code touches: LLaVA's vision tower, with a bundle inside.

Shapes: B images, S pixels a side, P prefix tokens, N patches, D features a token (see spec.py).
"""

import json
import logging
import math
import os
import shlex
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from trtower.bundle import CONFIG, PREPROCESSOR, Bundle
from trtower.errors import BackendError, ConfigError, InputError
from trtower.image_processor import ImageProcessor
from trtower.runners import Runner
from trtower.runners.choose import choose
from trtower.spec import normalise_layers

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="VisionTower")


class VisionTower(nn.Module):
    """A compiled vision tower that answers like the eager one.

    It is a module, so that it can hang where the eager tower hung, but its weights live in the engine: its one
    parameter is an empty anchor that tells callers the device and dtype, and its state dict is empty. Casting
    it (`.half()`, `.to(dtype)`) leaves the engine as it was exported; `.to(device)` opens the bundle there.

    `check_finite` refuses images with NaN or infinity. By default that is done where it costs nothing, on the
    CPU; on CUDA it would wait for the GPU in every call, and such images give NaN as they do in eager PyTorch.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        select_feature: str | None = None,
        backend: str = "auto",
        device: str | torch.device | None = None,
        check_finite: bool | None = None,
    ) -> None:
        super().__init__()
        self.bundle = Bundle.open(bundle)
        self.spec = self.bundle.manifest.spec
        self.vision_tower_name = str(bundle)
        self._select_layer: int | Sequence[int] = (
            self.spec.layers[0] if len(self.spec.layers) == 1 else list(self.spec.layers)
        )
        self.select_feature = self.spec.select_feature if select_feature is None else select_feature
        self.image_processor = ImageProcessor.from_file(self.bundle.verify(PREPROCESSOR))
        self.cfg_only = TowerConfig(**json.loads(self.bundle.read(CONFIG)))
        self.check_finite = check_finite
        self._backend, self._asked_device = backend, device
        self.spec.first_token(self.select_feature)
        self._runner: Runner | None = None
        # On the CPU whatever the default device: from_pretrained makes models on the meta device, which has no weights.
        self._anchor = self._make_anchor(torch.device("cpu"))

    @staticmethod
    def load(
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        device: str | torch.device | None = None,
        *,
        check_finite: bool | None = None,
    ) -> "VisionTower":
        """Open a bundle and make it ready to run.

        `backend`: "auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda" or "onnxruntime-cpu". `device`: where it
        must run; None leaves that to the backend. Raises BundleError and BackendError.
        """
        tower = VisionTower(bundle, backend=backend, device=device, check_finite=check_finite)
        tower.load_model()
        return tower

    @property
    def is_loaded(self) -> bool:
        """Whether `load_model` was called."""
        return self._runner is not None

    def load_model(self, device_map: Any = None) -> None:
        """Verify the bundle's files and load them; a second call does nothing.

        `device_map`: a device, or Hugging Face's {"": device}; None and "auto" keep the device given before.
        """
        if self.is_loaded:
            logger.info("%s is already loaded, `load_model` called again, skipping.", self.vision_tower_name)
            return
        self._open(_device_from_map(device_map) or self._asked_device)

    @torch.no_grad()
    def forward(self, images: "torch.Tensor | list[torch.Tensor]") -> "torch.Tensor | list[torch.Tensor]":
        """Turn images (B, 3, S, S) into features (B, N, D), or (B, P + N, D) under `cls_patch`.

        A list of (3, S, S) gives a list of (1, N, D) in the same order, run together as batches. Images of any
        device and floating dtype are taken; features come on the tower's device in the dtype of the images.
        Raises InputError.
        """
        runner = self._runner
        if runner is None:
            raise BackendError(f"{self.vision_tower_name} is not loaded: call load_model() first.")
        if isinstance(images, (list, tuple)):
            return self._forward_list(runner, images)
        self._check(images, "images", batched=True)
        features = self._run(runner, images.to(runner.device, runner.dtype).contiguous())
        return features.to(images.dtype)

    def _forward_list(self, runner: Runner, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if not images:
            raise InputError("images is an empty list; at least one image is expected.")
        for index, image in enumerate(images):
            self._check(image, f"images[{index}]", batched=False)
        pixel_values = torch.empty((len(images), *images[0].shape), dtype=runner.dtype, device=runner.device)
        for row, image in zip(pixel_values, images, strict=True):
            row.copy_(image)
        features = self._run(runner, pixel_values)
        return [features[i : i + 1].to(image.dtype) for i, image in enumerate(images)]

    def _run(self, runner: Runner, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run any number of images and cut the features out: (B, 3, S, S) -> (B, N, D)."""
        batch = len(pixel_values)
        finite = runner.device.type == "cpu" if self.check_finite is None else self.check_finite
        if finite and not all(math.isfinite(extreme) for extreme in pixel_values.aminmax()):  # NaN is both, if any is
            bad = pixel_values.numel() - int(pixel_values.isfinite().sum())
            raise InputError(f"images holds {bad} values that are NaN or infinite in {runner.dtype}.")
        shape = (batch, self.spec.num_tokens, self.spec.hidden_size)
        hidden_states = torch.empty(shape, dtype=runner.dtype, device=runner.device)
        for start, stop in self.bundle.manifest.batch.pieces(batch):
            runner.run(pixel_values[start:stop], hidden_states[start:stop])
        return self.feature_select(hidden_states)

    def feature_select(self, image_forward_outs: Any) -> torch.Tensor:
        """Drop the prefix tokens unless `cls_patch` keeps them: (B, P + N, D) -> (B, N, D).

        Takes all tokens as a tensor, or as LLaVA does an output with `hidden_states` of the full tower.
        """
        tokens = image_forward_outs
        if not isinstance(tokens, torch.Tensor):
            tokens = torch.cat([image_forward_outs.hidden_states[layer] for layer in self.spec.layers], dim=-1)
        selected: torch.Tensor = tokens[:, self.spec.first_token(self.select_feature) :]
        return selected

    def _check(self, images: torch.Tensor, name: str, *, batched: bool) -> None:
        if not isinstance(images, torch.Tensor):
            raise InputError(f"{name} is a {type(images).__name__}; a torch.Tensor or a list of them is expected.")
        size, batch = self.spec.image_size, self.bundle.manifest.batch
        expected = (3, size, size)
        if tuple(images.shape[-3:]) != expected or images.ndim != 3 + batched or 0 in images.shape:
            takes = f"({batch.min} to {batch.max}, 3, {size}, {size})" if batched else f"{expected} in a list"
            raise InputError(f"{name} has shape {tuple(images.shape)}; this engine takes {takes}.")
        if not images.is_floating_point():
            raise InputError(
                f"{name} has dtype {images.dtype}; floating-point pixel_values are expected, as image_processor makes."
            )
        if images.is_meta:
            raise InputError(f"{name} is on the meta device, which holds no pixels.")

    def _open(self, device: str | torch.device | None) -> None:
        self._runner = choose(self.bundle, self._backend, device)
        self._anchor = self._make_anchor(self._runner.device)

    def _make_anchor(self, device: torch.device) -> nn.Parameter:
        return nn.Parameter(torch.empty(0, dtype=self.dtype, device=device), requires_grad=False)

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)`, called here or on the model around this tower."""
        before = self._anchor.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._anchor.device
        if after != before:
            self._asked_device = after
            if self.is_loaded:
                self._open(after)
        if self._anchor.dtype != self.dtype:
            self._anchor.data = self._anchor.data.to(self.dtype)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing: the weights are in the bundle."""

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take nothing, and report weights that were meant for the tower: the engine cannot take them in."""
        unexpected_keys += [key for key in state_dict if key.startswith(prefix)]

    @property
    def select_layer(self) -> int | Sequence[int]:
        """The layer code that is read; setting it to another layer than the bundle holds raises ConfigError."""
        return self._select_layer

    @select_layer.setter
    def select_layer(self, select_layer: int | Sequence[int]) -> None:
        layers = normalise_layers(select_layer, self.spec.num_layers)
        if layers != self.spec.layers:
            message = (
                f"select_layer={select_layer} is hidden state {_join(layers)} of {self.spec.num_layers} layers; "
                f"{self.bundle.path} holds {_join(self.spec.layers)}."
            )
            if isinstance(select_layer, int):
                source = self.bundle.manifest.source
                command = ["trtower", "export", source.checkpoint, "--select-layer", str(select_layer)]
                command += ["--random-weights"] if source.random_weights else []
                message += f" Export it: {shlex.join([*command, '--out', f'{self.bundle.path}-layer{select_layer}'])}"
            raise ConfigError(message)
        self._select_layer = select_layer

    @property
    def backend(self) -> str:
        """What really runs, such as "tensorrt-rtx 1.7.1, sm89"."""
        if self._runner is None:
            return "not loaded"
        return self._runner.name

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros (1, D), for samples without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the engine computes in, whatever dtype the images have."""
        dtype: torch.dtype = getattr(torch, self.bundle.manifest.input.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the tower runs; before loading, where it was moved to."""
        return self._runner.device if self._runner else self._anchor.device

    @property
    def config(self) -> "TowerConfig":
        """The checkpoint's vision config."""
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        """D: the width of a feature, over all layers that are read."""
        return self.spec.hidden_size

    @property
    def image_size(self) -> int:
        """S: the pixels of a side."""
        return self.spec.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.spec.num_patches_per_side

    @property
    def num_patches(self) -> int:
        """N: the square of the side, whether or not the CLS token is kept."""
        return self.spec.num_patches

    def extra_repr(self) -> str:
        """Tell what `print(model)` should show of this module."""
        return f"{self.vision_tower_name}, backend={self.backend!r}, layers={self.spec.layers}, {self.select_feature!r}"


class CLIPVisionTower(VisionTower):
    """LLaVA's class, with its signature and semantics; ``vision_tower`` is the path of a bundle.

    ``args`` is the model's config: `mm_vision_select_layer` must be what the bundle holds, and
    `mm_vision_select_feature` defaults to "patch". LLaVA-NeXT passes the same as `vision_tower_cfg`.
    """

    def __init__(
        self,
        vision_tower: str | os.PathLike[str],
        args: Any = None,
        delay_load: bool = False,
        *,
        vision_tower_cfg: Any = None,
        backend: str = "auto",
        device: str | torch.device | None = None,
        check_finite: bool | None = None,
    ) -> None:
        args = vision_tower_cfg if args is None else args
        if not hasattr(args, "mm_vision_select_layer"):
            raise ConfigError(
                "args has no mm_vision_select_layer. Without a LLaVA config: trtower.VisionTower.load(…)."
            )
        if getattr(args, "s2", False):
            raise ConfigError("s2=True asks for the multi-scale tower, which trtower does not have: set s2 to False.")
        feature = getattr(args, "mm_vision_select_feature", "patch")
        super().__init__(
            vision_tower, select_feature=feature, backend=backend, device=device, check_finite=check_finite
        )
        self.select_layer = args.mm_vision_select_layer
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> CLIPVisionTower:
    """Build the tower that a LLaVA config names in `mm_vision_tower` or `vision_tower`, as LLaVA's function does."""
    path = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
    if path is None:
        raise ConfigError("the config has neither mm_vision_tower nor vision_tower: set one to a bundle's path.")
    return CLIPVisionTower(path, args=vision_tower_cfg, **kwargs)


class TowerConfig(SimpleNamespace):
    """The vision config as Hugging Face wrote it, by attribute."""

    def to_dict(self) -> dict[str, Any]:
        """Give the config as config.json has it."""
        return dict(vars(self))


def _join(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _device_from_map(device_map: Any) -> str | torch.device | None:
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ConfigError(f"device_map={device_map} splits the tower; an engine is whole: give {{'': device}}.")
        device_map = device_map[""]
    if device_map is None or device_map == "auto":
        return None
    return torch.device("cuda", device_map) if isinstance(device_map, int) else device_map
