"""The options of an export, checked against each other when they are created."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtower.errors import ConfigError
from trtower.head import EMBEDDING, HEADS, NO_HEAD, POOLS
from trtower.layer_codes import LayerCode
from trtower.names import check_name
from trtower.spec import EIGHT_BIT, FLOAT, NCHW, PRECISIONS, BatchProfile, check_pixels, merge_profiles
from trtower_export.targets.faults import check_accepted

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Permissions for checkpoints that could run their author's code. All are off by default.

    Attributes:
        allow_pickle: Read pickled weights; they can run code when they are read.
        remote_code: Run the checkpoint's own Python code (transformers' `trust_remote_code`).
    """

    allow_pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export from a checkpoint, and how. An option that is left out has the default named below.

    Args:
        select_layer: The hidden states to read: an index such as -2, several, or "last_hidden_state". Default: the
            checkpoint's, else its recipe's, else -2.
        select_feature: The tokens to keep: "patch", "cls_patch" or a slice of LLaVA-NeXT. Default: the checkpoint's,
            else its recipe's, else "patch".
        image_size: Side of the square input in pixels; positions are interpolated to it. Default: the recipe's, else
            the checkpoint's.
        pixels: What the engine takes: "float" (the default), pixels as the image processor prepares them, or "uint8",
            bytes that the graph rescales and normalises itself.
        layout: "nchw" (the default) for (B, 3, S, S), or "nhwc" for bytes (B, S, S, 3).
        head: What follows the hidden states in the engine: "none" (the default), the checkpoint's own "projector", or
            "embedding", one vector per image. The layer and tokens are then those that the model's head reads.
        normalize: Give embeddings the length 1. Default: False.
        pool: What the embedding of a model without a pooling head is made of: "cls" (the default) or "cls_mean".
        precision: "fp16" (the default), "bf16", "fp32", "fp8", "int8" or "auto". "auto" is FP16 with as few operations
            in FP32 as the check's bounds allow on ``images`` and on drawn images. "fp8" and "int8" are calibrated on
            ``images``.
        keep_fp32: Operations to keep in FP32, named as `trtower doctor` lists them; `*` is a wildcard.
        keep_fp16: Layers to keep in FP16 with "fp8" or "int8", named as ``keep_fp32``.
        images: Folder of images for the check, the search of "auto" and calibration. Default: the demo extra's
            photographs.
        profiles: Batch profiles: the fewest, tuned-for and most images per engine call. Default: the recipe's, else
            1, 8, 32.
        flavour: The plan to build: "tensorrt", "tensorrt-rtx", "none", or "auto" (the default): what this machine can
            build.
        store: Folder that keeps built plans for reuse. Default: none, so each plan is built anew.
        compute_capabilities: GPUs to build the plan for, such as "8.9". Default: a portable plan of TensorRT-RTX (with
            "fp8" a plan for the GPUs that have FP8), or this machine's GPU.
        target: The deployment to export for, such as "jetpack-6.2"; `trtower targets` lists them. It decides which plan
            is built, is checked for what its GPUs and its TensorRT cannot do, and is named in BUILD.md. Default: none.
        accept_known_faults: Names of known faults of the target's TensorRT that do not stop the export. Default: none.
        random_weights: Rehearse without the weights. Size, build time and latency are the real ones. Default: False.
        revision: Branch, tag or commit on the hub.
        tower: Which tower, if the checkpoint has several.
        trust: Whether to read pickled weights and run the checkpoint's own code. Default: neither.
        overwrite: Replace an existing bundle and its plans. Default: False.
        check: Finish with a check on two photographs. Default: True.

    Raises:
        ConfigError: The precision or the profiles are invalid, or one option contradicts another. `export_tower` checks
            the rest.
    """

    select_layer: LayerCode | None = None
    select_feature: str | None = None
    image_size: int | None = None
    pixels: str = FLOAT
    layout: str = NCHW
    head: str = NO_HEAD
    normalize: bool = False
    pool: str | None = None
    precision: str = "fp16"
    keep_fp32: tuple[str, ...] = ()
    keep_fp16: tuple[str, ...] = ()
    images: Path | None = None
    profiles: tuple[BatchProfile, ...] = ()
    flavour: str = "auto"
    store: Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    target: str | None = None
    accept_known_faults: tuple[str, ...] = ()
    random_weights: bool = False
    revision: str | None = None
    tower: str | None = None
    trust: Trust = field(default_factory=Trust)
    overwrite: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        if self.profiles:
            merge_profiles(self.profiles)
        check_pixels(self.pixels, self.layout)
        self._check_head()
        check_name("precision", self.precision, (AUTO, *PRECISIONS))
        check_accepted(self.accept_known_faults)
        if self.images is not None and not self.check and not self.runs_on_images:
            raise ConfigError(
                f"--images is only for the check, which --no-check skips; precision {self.precision} needs no images: "
                "drop --images or --no-check."
            )
        if self.keep_fp32 and self.precision == "fp32":
            raise ConfigError("--keep-fp32 is for half precision; with --precision fp32 every operation is in FP32.")
        if self.keep_fp16 and not self.calibrates:
            raise ConfigError(
                f"--keep-fp16 needs --precision {' or '.join(EIGHT_BIT)}; the precision is {self.precision}."
            )

    def _check_head(self) -> None:
        check_name("head", self.head, (NO_HEAD, *HEADS))
        if self.pool is not None:
            check_name("pool", self.pool, POOLS)
        if self.head != EMBEDDING and (self.normalize or self.pool):
            option = "--normalize" if self.normalize else "--pool"
            raise ConfigError(f"{option} needs --head embedding; the head is {self.head}.")
        if self.head == EMBEDDING and (self.select_layer is not None or self.select_feature is not None):
            raise ConfigError(
                "--head embedding is made of the last hidden state: leave out --select-layer and --select-feature."
            )

    @property
    def with_head(self) -> bool:
        """Whether the engine ends with a head."""
        return self.head != NO_HEAD

    @property
    def of_checkpoint(self) -> dict[str, Any]:
        """The keyword arguments of `open_checkpoint`."""
        return {name: getattr(self, name) for name in ("random_weights", "revision", "trust", "tower")}

    @property
    def graph_precision(self) -> str:
        """The precision of the graph, as in its manifest."""
        return "fp16" if self.searches else self.precision

    @property
    def searches(self) -> bool:
        """Whether a search on images decides which operations stay in FP32."""
        return self.precision == AUTO

    @property
    def calibrates(self) -> bool:
        """Whether images calibrate the 8-bit ranges."""
        return self.precision in EIGHT_BIT

    @property
    def runs_on_images(self) -> bool:
        """Whether images decide the precision; then all of them are used."""
        return self.searches or self.calibrates
