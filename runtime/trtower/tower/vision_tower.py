"""The surface that model code touches: a vision tower with a bundle inside.

Shapes: B images, T tiles of one, S pixels a side, P prefix tokens, N patches, D features a token (see spec.py).
"""

import json
import logging
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import CONFIG, PREPROCESSOR
from trtower.dtypes import DTYPES
from trtower.errors import BackendError, BundleError, ConfigError, InputError, one_line
from trtower.layer_codes import LayerCode
from trtower.runners.base import EngineOptions, Runner, run_batch
from trtower.runners.choose import choose
from trtower.runners.device import parse_device
from trtower.runners.holder import Holder, refuse_fork
from trtower.runners.observation import OnBatch, observed
from trtower.spec import profile_batches
from trtower.tower.anchor import Anchor
from trtower.tower.attribute_dict import AttributeDict
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.inputs import can_fill, check_images, check_out, one_input
from trtower.tower.pick import pick, whole_code
from trtower.tower.pixel_range import PixelRange
from trtower.tower.vision_model import VisionModel, make_vision_model

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="VisionTower")


class VisionTower(nn.Module):
    """A compiled vision tower that answers like the eager one.

    It is a module, so that it can hang where the eager tower hung, but its weights live in the engine: its one
    parameter is an empty anchor that tells callers the device and dtype, and its state dict is empty. Casting
    it (`.half()`, `.to(dtype)`) leaves the engine as it was exported; `.to(device)` opens the bundle there.

    `select_layer` and `select_feature` pick among the hidden states that the bundle holds, with any code of
    layer_codes.py; without them everything is read, in the bundle's order. LLaVA's `num_patches` never counts the
    CLS token; with `count_cls` it does under `cls_patch`, as LLaVA-NeXT's.

    `check_finite` refuses images with NaN or infinity. By default that is done where it costs nothing, on the
    CPU; on CUDA it would wait for the GPU in every call, and such images give NaN as they do in eager PyTorch.
    A warning names the range of images that the image processor did not make, once: on CUDA only the first call is
    looked at.

    `on_batch` may be set to a callback that is told of every engine call (see observation.py); what it raises, the call
    raises. `nvtx` may be set to True for an NVTX range around each. A tower belongs to the process that loaded it: it
    is not pickled, and refuses after a fork. Threads may share it, and close or move it while others call it.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        *,
        select_layer: LayerCode | None = None,
        select_feature: str | None = None,
        backend: str = "auto",
        device: str | torch.device | None = None,
        check_finite: bool | None = None,
        count_cls: bool = False,
        require_certificate: bool = False,
        engine: EngineOptions | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(engine, EngineOptions | None):
            raise ConfigError(f"engine is {engine!r}; expected trtower.EngineOptions(…).")
        self.bundle = Bundle.open(bundle)
        self.spec = self.bundle.manifest.spec
        self.vision_tower_name = str(bundle)
        self.image_processor = ImageProcessor.from_file(self.bundle.verify(PREPROCESSOR))
        self.cfg_only = TowerConfig(**json.loads(self.bundle.read(CONFIG)))
        self._pixel_range = PixelRange(self.vision_tower_name, self.image_processor)
        self.check_finite, self.count_cls = check_finite, count_cls
        self.on_batch: OnBatch | None = None
        self._nvtx = False
        self._backend, self._asked_device, self._engine = backend, device, engine
        self._require_certificate = require_certificate
        self.select(
            whole_code(self.spec) if select_layer is None else select_layer,
            self.spec.select_feature if select_feature is None else select_feature,
        )
        self._holder = Holder(self.vision_tower_name)
        self._loading = threading.RLock()
        # Not at the end of Python, which would then wait for calls of threads that end with it.
        weakref.finalize(self, self._holder.close).atexit = False
        # On the CPU whatever the default device: from_pretrained makes models on the meta device, which has no weights.
        self._anchor = Anchor(self.dtype, torch.device("cpu"))

    @classmethod
    def load(
        cls: type[Self],
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        device: str | torch.device | None = None,
        *,
        select_layer: LayerCode | None = None,
        select_feature: str | None = None,
        check_finite: bool | None = None,
        count_cls: bool = False,
        require_certificate: bool = False,
        engine: EngineOptions | None = None,
    ) -> Self:
        """Open a bundle and make it ready to run; `from_pretrained` is another name for it.

        Args:
            bundle: The folder that `trtower export` has made.
            backend: "auto", which takes the best that runs here and keeps the bundle's bounds, or a name that
                `trtower inspect` lists, such as "tensorrt-rtx", which then runs or raises.
            device: Where it must run: "cpu", "cuda" or "cuda:1". None leaves that to the backend.
            select_layer: The hidden states to read of those that the bundle holds, by default all, in its order.
            select_feature: The tokens to read, such as "patch" or "cls_patch"; by default the bundle's.
            check_finite: Whether to refuse images with NaN or infinity. None: on the CPU only.
            count_cls: Whether `num_patches` counts the CLS token, as LLaVA-NeXT's does.
            require_certificate: Refuse the bundle unless its check passed, on these very files, for what runs here.
            engine: How a TensorRT plan is run.

        Raises:
            BundleError: The folder is not a bundle, is damaged, or is not certified.
            BackendError: No requested backend can run it here.
            ConfigError: An option has a value that it cannot have.
        """
        tower = cls._make(
            bundle,
            select_layer,
            select_feature,
            backend=backend,
            device=device,
            check_finite=check_finite,
            count_cls=count_cls,
            require_certificate=require_certificate,
            engine=engine,
        )
        tower.load_model()
        return tower

    from_pretrained = load

    @classmethod
    def _make(
        cls: type[Self],
        bundle: str | os.PathLike[str],
        select_layer: LayerCode | None,
        select_feature: str | None,
        **options: Any,
    ) -> Self:
        """Make a tower that is not loaded yet."""
        return cls(bundle, select_layer=select_layer, select_feature=select_feature, **options)

    @property
    def is_loaded(self) -> bool:
        """Whether `load_model` was called."""
        return self._runner is not None

    @property
    def _runner(self) -> Runner | None:
        return self._holder.runner

    @property
    def _placed_on(self) -> torch.device | None:
        """The GPU on which accelerate has put the anchor, past `.to`, as it dispatches a model by its device_map."""
        device = self._anchor.empty.device
        return None if device.type == "cpu" else device

    def load_model(self, device_map: Any = None) -> None:
        """Verify the bundle's files and load them; a second call does nothing.

        `device_map`: a device; Hugging Face's {"": device}, or that of a whole model, with an entry for its
        vision_tower; None and "auto" keep the device given before.
        """
        refuse_fork()
        asked = _device_from_map(device_map)
        if not self.is_loaded:
            with self._loading:
                if not self.is_loaded:
                    known = (asked, self._asked_device, self._placed_on)
                    self._open(next((device for device in known if device is not None), None))
                    return
        if asked is not None and parse_device(asked) != self.device:
            raise BackendError(f"{self.vision_tower_name} is loaded on {self.device}: .to({str(asked)!r}) moves it.")
        logger.info("%s is already loaded, `load_model` called again, skipping.", self.vision_tower_name)

    def warmup(self: Self, batches: Iterable[int] | None = None) -> Self:
        """Run the engine once on each number of images, so that no later call pays for what the first one does.

        By default every profile's minimum, optimum and maximum. On a GPU that holds for calls in the current stream:
        warm up in each stream that will serve. Returns the tower.
        """
        manifest, side = self.bundle.manifest, self.spec.image_size
        with self._holder.lend() as runner:
            for batch in profile_batches(manifest.profiles) if batches is None else batches:
                pixel_values = torch.zeros((batch, 3, side, side), dtype=runner.dtype, device=runner.device)
                run_batch(runner, manifest.batch, manifest.output, pixel_values)
            if runner.device.type == "cuda":
                torch.cuda.current_stream(runner.device).synchronize()
            runner.keep()
        return self

    def close(self) -> None:
        """Let calls in flight end and free the engine. `load_model` opens it again; a second close does nothing.

        In a fork it does nothing either: threads that a backend would wait for are in the process that loaded it.
        A tower that nobody holds any more is closed.
        """
        self._holder.close()

    def refuse_own_call(self) -> None:
        """Raise BackendError inside a call of this tower, in `on_batch`, where it cannot be closed."""
        self._holder.refuse_own_call()

    def __enter__(self: Self) -> Self:
        """Give the tower, which is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the tower."""
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied."""
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
        given = one_input(images, pixel_values)
        with self._holder.lend() as runner:
            if not isinstance(given, (list, tuple)):
                return self._encode_tensor(runner, given, out)
            if out is not None:
                raise InputError("out is for the features of one tensor, and images is a list.")
            if not given:
                raise InputError("images is an empty list; at least one image is expected.")
            for index, image in enumerate(given):
                self._check(image, f"images[{index}]", in_list=True)
            return self._encode(runner, given)

    def _encode_tensor(self, runner: Runner, images: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        self._check(images, "images", in_list=False)
        if out is not None:
            check_out(out, (*images.shape[:-3], self._tokens_of_an_image, self.hidden_size), runner.device)
        (features,) = self._encode(runner, [images], out)
        features = features if images.ndim == 4 else features.unflatten(0, images.shape[:2])
        if out is None:
            return features
        return out if features.data_ptr() == out.data_ptr() else out.copy_(features)

    def _encode(
        self, runner: Runner, images: Sequence[torch.Tensor], out: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Run images (..., 3, S, S) of one or several ranks together, and give (T, N, D) for the T in each.

        For ``out`` they are in the engine's dtype, and already there if they can be.
        """
        if len(images) == 1:
            image = images[0]
            pixel_values = image.to(runner.device, runner.dtype, memory_format=torch.contiguous_format).contiguous()
            features = self._run(runner, pixel_values.view(-1, *image.shape[-3:]), out)
            return [features.to(image.dtype) if out is None else features]
        counts = [image.shape[:-3].numel() for image in images]
        features = self._run(runner, self._pack(runner, images, sum(counts))).split(counts)
        return [part.to(image.dtype) for part, image in zip(features, images, strict=True)]

    def _pack(self, runner: Runner, images: Iterable[torch.Tensor], total: int) -> torch.Tensor:
        """Copy images (3, S, S) and (T, 3, S, S), ``total`` in all, into one batch where the engine reads it."""
        side = self.spec.image_size
        pixel_values = torch.empty((total, 3, side, side), dtype=runner.dtype, device=runner.device)
        start = 0
        for image in images:
            stop = start + image.shape[:-3].numel()
            pixel_values[start:stop] = image
            start = stop
        return pixel_values

    def _run(self, runner: Runner, pixel_values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Run any number of images and cut the features out: (B, 3, S, S) -> (B, N, D), in ``out`` where they fit."""
        whole = out is not None and self._pick.whole and can_fill(out, pixel_values, runner.dtype)
        tokens = out.view(-1, *out.shape[-2:]) if out is not None and whole else None
        return self.feature_select(self._run_tokens(runner, pixel_values, tokens))

    def _run_tokens(self, runner: Runner, pixel_values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Run any number of images, and leave all that the bundle holds: (B, 3, S, S) -> (B, P + N, D)."""
        finite = runner.device.type == "cpu" if self.check_finite is None else self.check_finite
        # Reading an extreme of pixels on a GPU waits for it, which a capture forbids: the runner refuses that in words.
        captured = pixel_values.is_cuda and torch.cuda.is_current_stream_capturing()
        if finite or not (self._pixel_range.looked or captured):
            low, high = (float(extreme) for extreme in pixel_values.aminmax())  # NaN is both, if any is
            if finite and not (math.isfinite(low) and math.isfinite(high)):
                bad = pixel_values.numel() - int(pixel_values.isfinite().sum())
                raise InputError(f"images holds {bad} values that are NaN or infinite in {runner.dtype}.")
            self._pixel_range.look(low, high)
        manifest = self.bundle.manifest
        watched = self.on_batch is not None or self.nvtx
        run = observed(runner, self.on_batch, nvtx=self.nvtx) if watched else None
        return run_batch(runner, manifest.batch, manifest.output, pixel_values, run=run, out=out)

    def read_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Turn images (B, 3, S, S) into every token of every layer that the bundle holds, (B, P + N, D).

        They come side by side in the bundle's order, in the dtype of the images. Raises InputError.
        """
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            found = tuple(images.shape) if isinstance(images, torch.Tensor) else f"a {type(images).__name__}"
            raise InputError(f"pixel_values is {found}; a tensor (B, 3, S, S) is expected.")
        side = self.spec.image_size  # of the engine, whatever sizes the tower takes
        if images.shape[1:] != (3, side, side):
            raise InputError(f"pixel_values has shape {tuple(images.shape)}; this engine takes (B, 3, {side}, {side}).")
        self._check(images, "pixel_values", in_list=False)
        with self._holder.lend() as runner:
            return self._run_tokens(runner, images.to(runner.device, runner.dtype).contiguous()).to(images.dtype)

    def feature_select(self, image_forward_outs: Any) -> torch.Tensor:
        """Cut the picked layers and tokens out: (B, P + N, all that the bundle holds) -> (B, N, D).

        Takes all tokens as a tensor, or as LLaVA does an output with `hidden_states` of the full tower.
        """
        return self._pick.cut(image_forward_outs)

    def _check(self, images: Any, name: str, *, in_list: bool) -> None:
        def expected() -> str:
            return self._expectation(in_list=in_list)

        check_images(images, name, dims=(3, 4) if in_list else (4, 5), fits=self._fits, expected=expected)

    @property
    def _tokens_of_an_image(self) -> int:
        """The tokens of one image among the features."""
        return self._pick.num_tokens

    def _fits(self, shape: torch.Size) -> bool:
        """Whether one image may be (C, H, W)."""
        return shape == (3, self.spec.image_size, self.spec.image_size)

    def _expectation(self, *, in_list: bool) -> str:
        """Say which shapes are taken."""
        image, batch = f"3, {self.spec.image_size}, {self.spec.image_size}", self.bundle.manifest.batch
        if in_list:
            return f"({image}) or tiles (T, {image}) in a list"
        least = f", B {batch.min} at least," if batch.min > 1 else ""
        return f"(B, {image}){least} or tiles (B, T, {image})"

    def _open(self, device: str | torch.device | None) -> Callable[[], None]:
        """Open the bundle on a device; give what closes what was open before, once its calls have ended."""
        refuse_fork()
        self._holder.refuse_own_call()
        if self._require_certificate and (reason := self.bundle.uncertifiable()):
            raise self._not_certified(reason, self._backend)
        certified = self._require_certificate
        runner = choose(self.bundle, self._backend, device, certified=certified, engine=self._engine)
        if certified and (reason := self.bundle.why_uncertified(runner.backend, runner.files)):
            runner.close()
            raise self._not_certified(reason, runner.backend)
        close = self._holder.swap(runner)
        certificate = self.bundle.find_certificate(runner.backend, runner.files[0])
        if certificate and not certificate.passed and not self.bundle.changed_since(certificate):
            logger.warning(
                "%s failed its check on %s: `trtower inspect` says what was missed.", self.bundle.path, runner.backend
            )
        self._anchor.place(runner.device)
        return close

    def _not_certified(self, reason: str, backend: str) -> BundleError:
        path = self.bundle.path
        check = f"trtower check {path} --backend {backend}"
        rehearsal = self.bundle.manifest.source.random_weights
        mend = "Export the checkpoint itself" if rehearsal else f"{check} certifies what runs here"
        return BundleError(f"{path} is not certified: {reason}. {mend}.")

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)`, called here or on the model around this tower. The dtype stays the engine's."""
        before = self.device
        after = self._device_after(fn, before)
        closes: Callable[[], None] | None = None
        if after != before and self.is_loaded:
            refuse_fork()
            with self._loading:
                closes = self._open(after)  # raises before anything has moved
        if self._anchor.empty.device != after:
            self._anchor.place(after)
        if after not in (before, torch.device("meta")):
            self._asked_device = after
        if closes:
            closes()
        return self

    def _device_after(self, fn: Callable[[torch.Tensor], torch.Tensor], before: torch.device) -> torch.device:
        """Ask a function that moves tensors where it would move this tower."""
        try:
            return fn(torch.empty(0, dtype=self.dtype, device=before)).device
        except (AssertionError, RuntimeError) as err:  # torch's words for a device that is not here
            raise BackendError(
                f"{self.vision_tower_name} cannot be moved from {before}: {one_line(err)}. It stays there."
            ) from err

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
        runner = self._runner
        return self._anchor.empty.device if runner is None else runner.device

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


def _device_from_map(device_map: Any) -> str | torch.device | None:
    if isinstance(device_map, dict):
        named = [key for key in device_map if str(key).rpartition(".")[2] == "vision_tower"]
        named = named or ([*device_map][:1] if len(set(device_map.values())) == 1 else [*device_map.keys() & {""}])
        if len(named) != 1:
            raise ConfigError(
                f"device_map={device_map} splits the tower or leaves it out; an engine is whole: pass {{'': device}}, "
                "or a map with one entry that ends in vision_tower."
            )
        device_map = device_map[named[0]]
    if device_map is None or device_map == "auto":
        return None
    return torch.device("cuda", device_map) if isinstance(device_map, int) else device_map
