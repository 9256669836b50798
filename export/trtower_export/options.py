"""What to make of a checkpoint: the options of an export, checked when they are put together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtower.errors import ConfigError
from trtower.layer_codes import LayerCode
from trtower.names import check_name
from trtower.spec import EIGHT_BIT, PRECISIONS, BatchProfile, merge_profiles

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a checkpoint may do that could run its author's code. Both are off unless the user asks."""

    allow_pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make of a checkpoint. None takes what the checkpoint says, or its recipe, or the default, as () does.

    ``precision`` "auto" is FP16 with the fewest operations in FP32 that the bounds of the check ask for on ``images``,
    a folder, and on drawn images; ``keep_fp32`` names such operations, as `trtower doctor` lists them. "fp8" and "int8"
    are calibrated on ``images``; ``keep_fp16`` names what they leave in FP16, by default see `left_in_half`. ``store``
    is a folder of plans that were built before (see store.py). ``tower`` names one of several towers of a checkpoint.
    """

    select_layer: LayerCode | None = None
    select_feature: str | None = None
    image_size: int | None = None
    precision: str = "fp16"
    keep_fp32: tuple[str, ...] = ()
    keep_fp16: tuple[str, ...] | None = None
    images: Path | None = None
    profiles: tuple[BatchProfile, ...] = ()
    flavour: str = "auto"
    store: Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    random_weights: bool = False
    revision: str | None = None
    tower: str | None = None
    trust: Trust = field(default_factory=Trust)
    overwrite: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        if self.profiles:
            merge_profiles(self.profiles)
        check_name("precision", self.precision, (AUTO, *PRECISIONS))
        if self.images is not None and not self.check and not self.runs_on_images:
            raise ConfigError(f"--images is read by the check, and precision {self.precision} reads none without it.")
        if self.keep_fp32 and self.precision == "fp32":
            raise ConfigError("--keep-fp32 is for half precision; with --precision fp32 every operation is in FP32.")
        if self.keep_fp16 is not None and not self.calibrates:
            raise ConfigError(
                f"--keep-fp16 is for {' and '.join(EIGHT_BIT)}; precision {self.precision} was asked for."
            )

    @property
    def of_checkpoint(self) -> dict[str, Any]:
        """The options of `open_checkpoint`."""
        return {name: getattr(self, name) for name in ("random_weights", "revision", "trust", "tower")}

    @property
    def graph_precision(self) -> str:
        """The precision of the graph, as its manifest says it."""
        return "fp16" if self.searches else self.precision

    @property
    def searches(self) -> bool:
        """Whether images decide what stays in FP32."""
        return self.precision == AUTO

    @property
    def calibrates(self) -> bool:
        """Whether images decide the ranges of 8 bits."""
        return self.precision in EIGHT_BIT

    @property
    def runs_on_images(self) -> bool:
        """Whether the precision is decided on images, as many as there are."""
        return self.searches or self.calibrates
