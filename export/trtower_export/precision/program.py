"""Trace a cut tower: operations in the configured precision, or in FP32 if a pattern or the search says so."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.export import ExportedProgram

from trtower.bundle.manifest import Calibration
from trtower.errors import ConfigError
from trtower.spec import BatchProfile, TowerSpec
from trtower_export.console import Progress
from trtower_export.graph.islands import keep_fp32
from trtower_export.graph.onnx_graph import Quantise, write_onnx
from trtower_export.graph.operations import Operations, trace
from trtower_export.options import ExportOptions
from trtower_export.precision.doctor import named_weights
from trtower_export.precision.quantisation import calibrate, linear_layers, write_quantised
from trtower_export.precision.search import find_islands


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The images that decide a precision: pixel values, each (1, 3, S, S), by kind ("photograph", "drawn").

    Empty for a precision that needs no images. ``sha256`` is that of the photographs.
    """

    pixel_values: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class TracedTower:
    """A traced tower, the operations that it keeps in FP32, and, for 8 bits, the function that quantises its graph."""

    precision: str
    program: ExportedProgram
    keep_fp32: tuple[str, ...]
    calibration: Calibration | None = None
    quantise: Quantise | None = None

    def write(self, spec: TowerSpec, folder: Path) -> None:
        """Write the graphs and their weights into a bundle's folder. Raises BuildError."""
        input_, output = spec.input(self.precision), spec.output(self.precision)
        write_onnx(self.program, input_, output, folder, islands=bool(self.keep_fp32), quantise=self.quantise)


def trace_in_precision(
    tower: nn.Module,
    spec: TowerSpec,
    batch: BatchProfile,
    options: ExportOptions,
    samples: Samples,
    progress: Progress,
) -> TracedTower:
    """Trace ``tower`` in the precision of ``options``. This may cast the tower itself.

    Raises ConfigError if a pattern matches no operation or nothing is left to quantise, BuildError if the bounds are
    missed whatever stays in FP32, and CheckpointError if the tower is not finite on an image.
    """
    precision, patterns = options.graph_precision, options.keep_fp32
    if options.searches:
        patterns = find_islands(tower, spec, samples.pixel_values, progress, always=patterns)
    with progress.step("Trace"):
        program, kept = trace_with_islands(tower, spec, precision, batch, patterns, copied=options.calibrates)
    if options.searches or kept:
        progress.say(f"kept in FP32: {', '.join(kept) or 'nothing, FP16 alone meets the bounds'}")
    if not options.calibrates:
        return TracedTower(precision=precision, program=program, keep_fp32=kept)
    images = [each for some in samples.pixel_values.values() for each in some]
    with progress.step(f"Calibrate {precision} on {len(images)} images"):
        leave = _left_in_fp16(tower, program, options.keep_fp16).union(kept)
        scales = calibrate(tower, precision, images, leave)
    progress.say(f"quantised to {precision.upper()}: {len(scales)} of {len(linear_layers(tower))} linear layers")
    return TracedTower(
        precision=precision,
        program=program,
        keep_fp32=kept,
        calibration=Calibration(layers=len(scales), images=len(images), images_sha256=samples.sha256),
        quantise=partial(write_quantised, precision=precision, scales=scales),
    )


def _left_in_fp16(tower: nn.Module, program: ExportedProgram, patterns: Sequence[str]) -> set[str]:
    """Return the operations that match ``patterns``; raise ConfigError if a pattern matches no linear layer."""
    operations, layers, found = Operations(program), linear_layers(tower), set[str]()
    for pattern in patterns:
        matched = operations.match([pattern])
        if not set(layers).intersection(matched):
            raise ConfigError(
                f"--keep-fp16 {pattern!r} matches no linear layer, and everything else is in FP16 anyway: leave "
                f"it out, or name one such as {layers[-1]}."
            )
        found.update(matched)
    return found


def trace_with_islands(
    tower: nn.Module,
    spec: TowerSpec,
    precision: str,
    batch: BatchProfile,
    patterns: Sequence[str],
    *,
    copied: bool = False,
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Trace ``tower`` with the operations that match ``patterns`` in FP32, and also return their names.

    With ``patterns`` or ``copied``, a copy of the tower is cast to ``precision`` and traced. Otherwise the tower itself
    is, which saves memory. Raises ConfigError if a pattern matches nothing.
    """
    program = trace(
        copy.deepcopy(tower) if patterns or copied else tower,
        spec.input(precision),
        batch,
        spec.output(precision).dtype,
    )
    kept = Operations(program, spelled_out=True).match(patterns) if patterns else ()
    if kept:
        keep_fp32(program, kept, named_weights(tower))
    return program, kept
