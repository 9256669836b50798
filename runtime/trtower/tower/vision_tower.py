"""The vision tower that model code calls: a torch module with a bundle inside.

Shapes: B images, T tiles per image, S pixels per side, P prefix tokens, N patches, D features per token (see spec.py).
"""

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from typing_extensions import Self, Unpack

from trtower.bundle.manifest import PREPROCESSOR
from trtower.errors import BackendError, ConfigError, InputError
from trtower.layer_codes import LayerCode
from trtower.runners.base import Runner, run_batch
from trtower.runners.observation import OnBatch, observed
from trtower.tower.anchor import Anchor
from trtower.tower.answers import TowerAnswers
from trtower.tower.bytes_processor import BytesProcessor
from trtower.tower.engine import Engine
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.images import Images, one_input
from trtower.tower.options import OtherKeywords, TowerKeywords, TowerOptions, takes_options
from trtower.tower.pixel_range import PixelRange
from trtower.tower.vision_model import VisionModel, make_vision_model

if TYPE_CHECKING:
    from trtower.tower.prepare import Picture

TowerT = TypeVar("TowerT", bound="VisionTower")  # not Self: mypy then rejects `from_pretrained`, another name of `load`


class VisionTower(TowerAnswers):
    """A compiled vision tower that answers like the eager one.

    It is a module, so it fits where the eager tower was, but its weights live in the engine. Its only parameter is an
    empty anchor that tells callers the device and dtype, and its state dict is empty. Casting it (`.half()`,
    `.to(dtype)`) does not change the engine; `.to(device)` opens the bundle on that device.

    It warns once, with the range of values, if images do not look like the image processor's output. It inspects only
    the first call, unless `check_finite` is True, or None on the CPU.

    Threads may share a tower, and may close or move it while others call it. A tower belongs to the process that loaded
    it: it cannot be pickled, and its calls raise after a fork.

    The constructor does not load the engine; `load` does, and documents the options that both accept.

    Attributes:
        on_batch: A callback that receives a `BatchReport` for every engine call, or None. If it raises, so does the
            tower's call.
        bundle: The opened bundle.
        spec: The shapes, layers and tokens of the bundle's tower.
        vision_tower_name: The path of the bundle, as passed.
        image_processor: Turns pictures into the pixel values that this tower expects.
        check_finite: As passed to `load`.
        count_cls: As passed to `load`.
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
        tower_options = TowerOptions(**options)
        super().__init__(bundle, select_layer, select_feature, count_cls=tower_options.count_cls)
        kind = ImageProcessor if self.spec.takes_floats else BytesProcessor
        self.image_processor = kind.from_file(self.bundle.verify(PREPROCESSOR))
        self._pixel_range = PixelRange(self.vision_tower_name, self.image_processor)
        self._images = Images(self.bundle.manifest)
        self.check_finite = tower_options.check_finite
        self.on_batch: OnBatch | None = None
        self._nvtx = False
        # On the CPU even if the default device differs: from_pretrained makes models on meta, which holds no data.
        self._anchor = Anchor(self.dtype, torch.device("cpu"))
        self._engine = Engine(self.vision_tower_name, self.bundle, tower_options, self._anchor)
        # Not at Python's exit, which would then wait for calls in daemon threads. Those end only with Python itself.
        weakref.finalize(self, self._engine.close).atexit = False

    @classmethod
    @takes_options
    def load(
        cls: type[TowerT],
        bundle: str | os.PathLike[str],
        backend: str = "auto",
        device: str | torch.device | None = None,
        *,
        select_layer: LayerCode | None = None,
        select_feature: str | None = None,
        **options: Unpack[OtherKeywords],
    ) -> TowerT:
        """Open a bundle and make it ready to run. `from_pretrained` is another name for this method.

        Args:
            bundle: The folder that `trtower export` wrote.
            backend: "auto" chooses the best backend that runs here; one that failed its check is used only if no other
                runs. A name that `trtower inspect` lists, such as "tensorrt-rtx", either runs or raises.
            device: Where to run: "cpu", "cuda" or "cuda:1". None lets the backend decide.
            select_layer: The hidden states to read, as any layer code of layer_codes.py. Default: all that the bundle
                holds, in its order.
            select_feature: The tokens to read, such as "patch" or "cls_patch". Default: the bundle's.
            check_finite: Whether to refuse images with NaN or infinity. None checks on the CPU only, where it costs
                nothing. On CUDA the check waits for the GPU in every call; without it, such images give NaN, as in
                eager PyTorch.
            count_cls: Whether `num_patches` counts the CLS token under `cls_patch`. LLaVA-NeXT counts it, LLaVA does
                not.
            require_certificate: Whether to refuse the bundle unless a check or a verification passed, with exactly
                these files and the backend that runs here. A rehearsal is always refused.
            verify: Whether to compare the engine with the bundle's golden answers when it is opened, and refuse it if
                it is wrong. This runs a few images in one batch, and needs no certificate and writes none.
            engine: How to run the bundle on a GPU.

        Returns:
            The loaded tower.

        Raises:
            BundleError: If the folder is not a bundle, is damaged, or lacks a required certificate.
            BackendError: If no requested backend can run the bundle here, or its answers are wrong with `verify`.
            ConfigError: If an option is invalid, or the bundle lacks a requested layer.
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
        """Make a tower without loading it."""
        return cls(bundle, select_layer=select_layer, select_feature=select_feature, **options)

    @property
    def is_loaded(self) -> bool:
        """Whether the engine is open: after `load_model`, before `close`."""
        return self.runner is not None

    @property
    def runner(self) -> Runner | None:
        """What executes the bundle; None if the tower is not loaded."""
        return self._engine.runner

    def load_model(self, device_map: Any = None) -> None:
        """Verify the bundle's files and load them. Do nothing if they are loaded already.

        Args:
            device_map: Where to load: a device, Hugging Face's {"": device}, or the map of a whole model with an entry
                for its vision_tower. None and "auto" keep the device configured before.

        Raises:
            ConfigError: If `device_map` is none of these.
            BackendError: If the tower is loaded on another device, or no requested backend can run it on this one.
            BundleError: If the bundle is damaged, or lacks a required certificate.
        """
        self._engine.load(device_map)

    def warmup(self, batches: Iterable[int] | None = None) -> Self:
        """Run the engine once per batch size, so that later calls do not pay for what a first call sets up.

        On a GPU this covers only calls in the current stream: warm up in each stream that will serve.

        Args:
            batches: Numbers of images, such as [1, 8]. Default: the minimum, optimum and maximum of every profile.

        Returns:
            The tower.

        Raises:
            ConfigError: If `batches` holds anything but positive integers.
            InputError: If one of them is below the minimum of the bundle's profiles.
            BackendError: If the tower is not loaded, or cannot run here.
        """
        self._engine.warm_up(batches)
        return self

    def close(self) -> None:
        """Wait for the calls in flight, then free the engine. `load_model` opens it again.

        This does nothing if the tower is closed already. It does nothing in a fork either: the threads that a backend
        would wait for exist only in the process that loaded it. A tower also closes when it is garbage-collected.

        Raises:
            BackendError: If one of the tower's own calls closes it, for example in `on_batch`.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BackendError(
            f"{self.vision_tower_name} cannot be pickled or copied: its engine belongs to this process. Pass the "
            "bundle's path instead, and load it where it is needed."
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

        Tiles (B, T, 3, S, S) give (B, T, N, D). A list of images (3, S, S) and tiles (T, 3, S, S) gives a list of
        (1, N, D) and (T, N, D), in the same order. All images of a call run together as batches. If the bundle ends
        with a projector, N and D are its tokens and width; if it ends with an embedding, features are (B, D).

        Args:
            images: Images or tiles, on any device and in any floating dtype; in torch.uint8 if the bundle takes bytes,
                then also as (B, S, S, 3) if it was exported so. What an image processor returned also works, if it
                holds only `pixel_values`.
            out: Where to write the features of one tensor, in the dtype of `out`. The engine writes there directly if
                `out` is contiguous, has the tower's dtype, and every token and layer is picked.
            pixel_values: Another way to pass `images`, so that `tower(**inputs)` works.

        Returns:
            Features on the tower's device, each in the dtype of its images, or in the tower's if they are bytes; or
            `out`, if passed.

        Raises:
            InputError: If `images` or `out` has a wrong type, shape or dtype, or if refused NaN or infinity is found.
            BackendError: If the tower is not loaded, or cannot run here, as in a fork or a CUDA graph capture.
        """
        inputs, pick = one_input(images, pixel_values), self._pick
        with self._engine.lend() as runner:
            packed = self._images.pack(inputs, runner)
            destination = self._images.find_destination(out, packed, pick, runner)
            tokens = self._run(runner, packed.pixel_values, destination)
            return self._images.unpack(packed, self.feature_select(tokens), out)

    @overload
    def encode(  # type: ignore[overload-overlap]
        self, pictures: Mapping[str, Any], *, batch_size: int | None = None, threads: int | None = None
    ) -> dict[str, torch.Tensor]: ...

    @overload
    def encode(
        self, pictures: "Picture | Iterable[Picture]", *, batch_size: int | None = None, threads: int | None = None
    ) -> torch.Tensor: ...

    @torch.no_grad()
    def encode(
        self, pictures: Any, *, batch_size: int | None = None, threads: int | None = None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Turn pictures into features: decode, prepare and run them.

        Each is prepared by `image_processor`, so as transformers' processor of the checkpoint does: grey, palette and
        CMYK become RGB, transparency is composited on white, and a file's EXIF orientation is ignored. LLaVA's loader
        ignores it, too; transformers' `load_image` turns the picture first, as `PIL.ImageOps.exif_transpose` does.
        16-bit pictures are refused. The bundle of a robot policy prepares a camera's frames as the policy does.

        Args:
            pictures: Paths, PIL images, uint8 arrays or tensors (H, W, C) or (C, H, W), or batches of arrays; one, or
                any iterable of them. They are read while others run, a batch ahead. For a robot policy, arrays may also
                be fractions from 0 to 1 in float32. A dict holds them by camera, and all cameras run together.
            batch_size: Pictures in one engine call. Default: what the bundle's plans are tuned for.
            threads: Threads that decode and prepare. Default: one for each processor, at most 8.

        Returns:
            The features (B, N, D), or (B, D) of an embedding, in the order of the pictures, with B of 1 for one; in the
            tower's dtype and on its device. Models that tile or pad pictures do that before: pass the tiles. For a dict
            of cameras, a dict of their features.

        Raises:
            InputError: If a picture cannot be read or prepared, or there are none. The message names it.
            ConfigError: If `batch_size` or `threads` is not a positive number.
            BackendError: If the tower is not loaded, or cannot run here.
        """
        from trtower.tower.prepare import count_threads, each_picture  # model code prepares by itself

        size = self.bundle.manifest.batch.opt if batch_size is None else batch_size
        if type(size) is not int or size < 1:
            raise ConfigError(f"batch_size={batch_size!r}; expected a number of at least 1.")
        number = count_threads(threads)
        if not isinstance(pictures, Mapping):
            return self._encode(each_picture(pictures, self.image_processor), size, number)
        cameras = {
            camera: [*each_picture(frames, self.image_processor, f"pictures[{camera!r}]")]
            for camera, frames in pictures.items()
        }
        features = self._encode(chain.from_iterable(cameras.values()), size, number)
        return dict(zip(cameras, features.split([*map(len, cameras.values())]), strict=True))

    def _encode(self, pictures: "Iterable[tuple[str, Picture]]", size: int, threads: int) -> torch.Tensor:
        from trtower.tower.prepare import prepare_batches

        features = [*map(self.run_prepared, prepare_batches(pictures, self.image_processor, size, threads))]
        if not features:
            raise InputError("pictures is empty; expected at least one.")
        return torch.cat(features)

    def run_prepared(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run any number of pictures that `image_processor` prepared: features (B, N, D), in the tower's dtype."""
        images = pixel_values.to(self.dtype) if self.spec.takes_floats else pixel_values
        extra = images[-1:].expand(max(0, self.bundle.manifest.batch.min - len(images)), *images.shape[1:])
        # Fewer images than the profiles accept are topped up, and what was added is dropped.
        features: Any = self.forward(torch.cat([images, extra]) if len(extra) else images)
        return cast("torch.Tensor", features[: len(images)])

    def _run(self, runner: Runner, pixel_values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Run any number of images and keep everything that the bundle holds: (B, 3, S, S) -> (B, P + N, D)."""
        if self.spec.takes_floats:
            self._pixel_range.check(pixel_values, finite=self.check_finite)
        manifest, is_observed = self.bundle.manifest, self.on_batch is not None or self.nvtx
        run = observed(runner, self.on_batch, nvtx=self.nvtx) if is_observed else None
        return run_batch(runner, manifest.batch, manifest.output, pixel_values, run=run, out=out)

    @torch.no_grad()
    def read_tokens(self, images: Any) -> torch.Tensor:
        """Turn images (B, 3, S, S) into every token of every layer that the bundle holds, (B, P + N, D).

        Args:
            images: One tensor of the engine's own size S, even if the tower accepts other sizes.

        Returns:
            The layers concatenated along D in the bundle's order, in the tower's dtype and on its device.

        Raises:
            InputError: If `images` has a wrong type, shape or dtype, or if refused NaN or infinity is found.
            BackendError: If the tower is not loaded, or cannot run here.
        """
        shape = self.bundle.manifest.input.row  # the engine's, even if the tower accepts other sizes
        if not isinstance(images, torch.Tensor) or images.shape[1:] != shape:
            is_tensor = isinstance(images, torch.Tensor)
            actual = f"has shape {tuple(images.shape)}" if is_tensor else f"is a {type(images).__name__}"
            accepted = ", ".join(map(str, ("B", *shape)))
            raise InputError(f"pixel_values {actual}; this engine accepts a tensor ({accepted}).")
        self._images.check(images, "pixel_values", in_list=False)
        with self._engine.lend() as runner:
            return self._run(runner, images.to(runner.device, runner.pixel_dtype).contiguous())

    def feature_select(self, image_forward_outs: Any) -> torch.Tensor:
        """Select the picked layers and tokens of (B, P + N, all layers): (B, N, D), or (B, P + N, D) under `cls_patch`.

        Args:
            image_forward_outs: All tokens as a tensor, or, as in LLaVA, the full tower's output with `hidden_states`.

        Returns:
            The picked features.
        """
        return self._pick.cut(image_forward_outs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move the engine when `.to(device)` is called here or on the model around this tower. Its dtype stays."""
        self._engine.move(fn)
        return self

    @property
    def vision_tower(self) -> VisionModel:
        """The vision model that model code calls or saves under this name in LLaVA's wrapper (see vision_model.py)."""
        return make_vision_model(self, self._anchor)

    @property
    def backend(self) -> str:
        """What actually runs, such as "tensorrt-rtx 1.7.1, sm89", or "not loaded"."""
        return "not loaded" if (runner := self.runner) is None else runner.name

    @property
    def nvtx(self) -> bool:
        """Whether to put an NVTX range around each engine call. Setting it to True needs a torch with CUDA."""
        return self._nvtx

    @nvtx.setter
    def nvtx(self, nvtx: bool) -> None:
        if nvtx and torch.version.cuda is None:
            raise BackendError("nvtx=True needs NVTX, but this torch is built without CUDA. Install a torch with CUDA.")
        self._nvtx = nvtx

    @property
    def dummy_feature(self) -> torch.Tensor:
        """Zeros (1, D), for samples without an image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def device(self) -> torch.device:
        """The device that the tower runs on; before loading, the device that it was moved to."""
        return self._engine.device

    def extra_repr(self) -> str:
        """Return what `print(model)` shows for this module."""
        return (
            f"{self.vision_tower_name}, backend={self.backend!r}, layers={self._pick.layers}, {self.select_feature!r}"
        )
