"""The surface that model code touches: a vision tower with a bundle inside.

Shapes: B images, T tiles of one, S pixels a side, P prefix tokens, N patches, D features a token (see spec.py).
"""

import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Self, Unpack

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import CONFIG, PREPROCESSOR
from trtower.dtypes import DTYPES
from trtower.errors import BackendError, InputError
from trtower.layer_codes import LayerCode
from trtower.runners.base import Runner, run_batch
from trtower.runners.observation import OnBatch, observed
from trtower.tower.anchor import Anchor
from trtower.tower.dicts import AttributeDict
from trtower.tower.engine import Engine
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.images import Images, one_input
from trtower.tower.options import OtherKeywords, TowerKeywords, TowerOptions, takes_options
from trtower.tower.pick import pick, whole_code
from trtower.tower.pixel_range import PixelRange
from trtower.tower.vision_model import VisionModel, make_vision_model


class VisionTower(nn.Module):
    """A compiled vision tower that answers like the eager one.

    It is a module, so that it can hang where the eager tower hung, but its weights live in the engine: its one
    parameter is an empty anchor that tells callers the device and dtype, and its state dict is empty. Casting
    it (`.half()`, `.to(dtype)`) leaves the engine as it was exported; `.to(device)` opens the bundle there.

    `load` says what its options mean. A warning names the range of images that the image processor did not make,
    once: on CUDA only the first call is looked at, unless `check_finite` is True.

    `on_batch` may be set to a callback that is told of every engine call (see observation.py); what it raises, the call
    raises. `nvtx` may be set to True for an NVTX range around each. A tower belongs to the process that loaded it: it
    is not pickled, and refuses after a fork. Threads may share it, and close or move it while others call it.
    """

    @takes_options
    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        select_layer: LayerCode | None = None,
        select_feature: str | None = None,
        **options: Unpack[TowerKeywords],
    ) -> None:
        super().__init__()
        given = TowerOptions(**options)
        self.bundle = Bundle.open(bundle)
        self.spec = self.bundle.manifest.spec
        self.vision_tower_name = str(bundle)
        self.image_processor = ImageProcessor.from_file(self.bundle.verify(PREPROCESSOR))
        self.cfg_only = TowerConfig(**json.loads(self.bundle.read(CONFIG)))
        self._pixel_range = PixelRange(self.vision_tower_name, self.image_processor)
        self._images = Images(self.bundle.manifest)
        self.check_finite, self.count_cls = given.check_finite, given.count_cls
        self.on_batch: OnBatch | None = None
        self._nvtx = False
        self.select(
            whole_code(self.spec) if select_layer is None else select_layer,
            self.spec.select_feature if select_feature is None else select_feature,
        )
        # On the CPU whatever the default device: from_pretrained makes models on the meta device, which has no weights.
        self._anchor = Anchor(self.dtype, torch.device("cpu"))
        self._engine = Engine(self.vision_tower_name, self.bundle, given, self._anchor)
        # Not at the end of Python, which would then wait for calls of threads that end with it.
        weakref.finalize(self, self._engine.close).atexit = False

    @classmethod
    @takes_options
    def load(
        cls,
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        device: str | torch.device | None = None,
        *,
        select_layer: LayerCode | None = None,
        select_feature: str | None = None,
        **options: Unpack[OtherKeywords],
    ) -> Self:
        """Open a bundle and make it ready to run; `from_pretrained` is another name for it.

        Args:
            bundle: The folder that `trtower export` has made.
            backend: "auto", which takes the best that runs here, one whose check failed only if nothing else does; or a
                name that `trtower inspect` lists, such as "tensorrt-rtx", which then runs or raises.
            device: Where it must run: "cpu", "cuda" or "cuda:1". None leaves that to the backend.
            select_layer: The hidden states to read of those that the bundle holds, by any code of layer_codes.py. By
                default all, in its order.
            select_feature: The tokens to read, such as "patch" or "cls_patch"; by default the bundle's.
            check_finite: Whether to refuse images with NaN or infinity. None: on the CPU only, where it costs nothing;
                on CUDA it waits for the GPU in every call, and such images give NaN as they do in eager PyTorch.
            count_cls: Whether `num_patches` counts the CLS token under `cls_patch`, as LLaVA-NeXT's does and LLaVA's
                does not.
            require_certificate: Refuse the bundle unless its check passed, on these very files, for what runs here.
            engine: How the bundle is run on a GPU.

        Raises:
            BundleError: The folder is not a bundle, is damaged, or is not certified.
            BackendError: No requested backend can run it here.
            ConfigError: An option has a value that it cannot have.
        """
        tower = cls._make(bundle, select_layer, select_feature, backend=backend, device=device, **options)
        tower.load_model()
        return tower

    from_pretrained = load

    @classmethod
    def _make(
        cls,
        bundle: str | os.PathLike[str],
        select_layer: LayerCode | None,
        select_feature: str | None,
        **options: Unpack[TowerKeywords],
    ) -> Self:
        """Make a tower that is not loaded yet."""
        return cls(bundle, select_layer=select_layer, select_feature=select_feature, **options)

    @property
    def is_loaded(self) -> bool:
        """Whether an engine is open: `load_model` was called, and `close` was not."""
        return self._runner is not None

    @property
    def _runner(self) -> Runner | None:
        return self._engine.runner

    def load_model(self, device_map: Any = None) -> None:
        """Verify the bundle's files and load them; a second call does nothing.

        `device_map`: a device; Hugging Face's {"": device}, or that of a whole model, with an entry for its
        vision_tower; None and "auto" keep the device given before. Raises ConfigError if it is none of these, and
        BackendError if the tower is loaded on another device, or cannot be there.
        """
        self._engine.load(device_map)

    def warmup(self, batches: Iterable[int] | None = None) -> Self:
        """Run the engine once on each number of images, so that no later call pays for what the first one does.

        By default every profile's minimum, optimum and maximum. On a GPU that holds for calls in the current stream:
        warm up in each stream that will serve. Returns the tower.
        """
        self._engine.warm_up(batches)
        return self

    def close(self) -> None:
        """Let calls in flight end and free the engine. `load_model` opens it again; a second close does nothing.

        In a fork it does nothing either: threads that a backend would wait for are in the process that loaded it.
        A tower that nobody holds any more is closed.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BackendError(
            f"{self.vision_tower_name} cannot be pickled or copied: its engine belongs to this process. Hand over the "
            "bundle's path, and load it where it is needed."
        )

    @torch.no_grad()
    def forward(
        self,
        images: "torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...] | Mapping[str, Any] | None" = None,
        out: torch.Tensor | None = None,
        *,
        pixel_values: "torch.Tensor | list[torch.Tensor] | None" = None,
    ) -> "torch.Tensor | list[torch.Tensor]":
        """Turn images (B, 3, S, S) into features (B, N, D), or (B, P + N, D) under `cls_patch`.

        Tiles (B, T, 3, S, S) give (B, T, N, D). A list of (3, S, S), tiles (T, 3, S, S), or both, gives a list of
        (1, N, D) and (T, N, D) in the same order. All of them run together as batches. Images of any device and
        floating dtype are taken; features come on the tower's device, each in the dtype of its images. With `out` the
        features of a tensor are written there, in its dtype, and it is returned; the engine itself writes there where
        `out` is contiguous and of the tower's dtype, and every token and layer is picked. What an image processor
        returns is taken as it is or as keywords, where it holds nothing but `pixel_values`. Raises InputError.
        """
        given, pick = one_input(images, pixel_values), self._pick
        with self._engine.lend() as runner:
            packed = self._images.pack(given, runner)
            place = self._images.place(out, packed, pick, runner)
            tokens = self._run(runner, packed.pixel_values, place)
            return self._images.unpack(packed, self.feature_select(tokens), out)

    def _run(self, runner: Runner, pixel_values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Run any number of images, and leave all that the bundle holds: (B, 3, S, S) -> (B, P + N, D)."""
        self._pixel_range.check(pixel_values, finite=self.check_finite)
        manifest = self.bundle.manifest
        watched = self.on_batch is not None or self.nvtx
        run = observed(runner, self.on_batch, nvtx=self.nvtx) if watched else None
        return run_batch(runner, manifest.batch, manifest.output, pixel_values, run=run, out=out)

    @torch.no_grad()
    def read_tokens(self, images: Any) -> torch.Tensor:
        """Turn images (B, 3, S, S) into every token of every layer that the bundle holds, (B, P + N, D).

        They come side by side in the bundle's order, in the tower's dtype. Raises InputError.
        """
        side = self.spec.image_size  # of the engine, whatever sizes the tower takes
        if not isinstance(images, torch.Tensor) or images.shape[1:] != (3, side, side):
            is_tensor = isinstance(images, torch.Tensor)
            found = f"has shape {tuple(images.shape)}" if is_tensor else f"is a {type(images).__name__}"
            raise InputError(f"pixel_values {found}; this engine takes a tensor (B, 3, {side}, {side}).")
        self._images.check(images, "pixel_values", in_list=False)
        with self._engine.lend() as runner:
            return self._run(runner, images.to(runner.device, runner.dtype).contiguous())

    def feature_select(self, image_forward_outs: Any) -> torch.Tensor:
        """Cut the picked layers and tokens out: (B, P + N, all that the bundle holds) -> (B, N, D).

        Takes all tokens as a tensor, or as LLaVA does an output with `hidden_states` of the full tower.
        """
        return self._pick.cut(image_forward_outs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)`, called here or on the model around this tower. The dtype stays the engine's."""
        self._engine.move(fn)
        return self

    def select(self, select_layer: LayerCode, select_feature: str) -> None:
        """Pick layers and tokens out of what the bundle holds; raise ConfigError naming what it lacks."""
        self._pick = pick(self.bundle, select_layer, select_feature)
        self._select_layer, self._select_feature = select_layer, select_feature

    @property
    def select_layer(self) -> LayerCode:
        """The layer code that is read. Setting it reads it with the feature there is; `select` sets both at once."""
        return self._select_layer

    @select_layer.setter
    def select_layer(self, select_layer: LayerCode) -> None:
        self.select(select_layer, self._select_feature)

    @property
    def select_feature(self) -> str:
        """The feature code as it was given. Setting it reads the layer code anew, which a slice shifts or replaces."""
        return self._select_feature

    @select_feature.setter
    def select_feature(self, select_feature: str) -> None:
        self.select(self._select_layer, select_feature)

    @property
    def vision_tower(self) -> VisionModel:
        """What LLaVA's wrapper holds under this name, for model code that calls or saves it (see vision_model.py)."""
        return make_vision_model(self, self._anchor)

    @property
    def backend(self) -> str:
        """What really runs, such as "tensorrt-rtx 1.7.1, sm89"."""
        runner = self._runner
        return "not loaded" if runner is None else runner.name

    @property
    def nvtx(self) -> bool:
        """Whether there is an NVTX range around each engine call. Setting it wants a torch with CUDA."""
        return self._nvtx

    @nvtx.setter
    def nvtx(self, nvtx: bool) -> None:
        if nvtx and torch.version.cuda is None:
            raise BackendError("nvtx: this torch is built without CUDA, and has no NVTX.")
        self._nvtx = nvtx

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros (1, D), for samples without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the engine computes in, whatever dtype the images have."""
        return DTYPES[self.bundle.manifest.input.dtype]

    @property
    def device(self) -> torch.device:
        """Where the tower runs; before loading, where it was moved to."""
        return self._engine.device

    @property
    def config(self) -> "TowerConfig":
        """The checkpoint's vision config."""
        return self.cfg_only

    @property
    def hidden_size(self) -> int:
        """D: the width of a feature, over all layers that are picked."""
        return self._pick.hidden_size

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
        """N: the square of the side, whether or not the CLS token is kept; with `count_cls`, every token that is."""
        return self._pick.num_tokens if self.count_cls else self.spec.num_patches

    def extra_repr(self) -> str:
        """Tell what `print(model)` should show of this module."""
        return (
            f"{self.vision_tower_name}, backend={self.backend!r}, layers={self._pick.layers}, {self.select_feature!r}"
        )


class TowerConfig(AttributeDict):
    """The vision config as Hugging Face wrote it, by key and by attribute. VILA saves it inside the model's config."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config as config.json has it."""
        return dict(self)
