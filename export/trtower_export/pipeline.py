"""From a checkpoint to a bundle: the whole story. A reader starts here.

checkpoint -> truncate -> precision -> onnx_graph -> engine -> bundle -> parity
"""

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxscript
import torch
import transformers

import trtower
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import CONFIG, GRAPH, GRAPH_DATA, PREPROCESSOR, SCHEMA, Calibration, Manifest, Source
from trtower.bundle.staging import describe, disk_errors, locked, refuse_existing, staged, write_manifest
from trtower.errors import BuildError, BundleError, ConfigError
from trtower.fingerprint import hash_weights
from trtower.layer_codes import LayerCode
from trtower.names import check_name
from trtower.spec import DEFAULT_BATCH, EIGHT_BIT, MIB, PRECISIONS, BatchProfile, merge_profiles
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.certify import DRAWN, certify
from trtower_export.check.photographs import (
    PHOTOGRAPH,
    Photographs,
    draw_images,
    load_photographs,
    prepare,
    say_skipped,
)
from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trtower_export.checkpoint.layouts import Trust
from trtower_export.checkpoint.preprocessor import fit_preprocessor, image_aspect_ratio
from trtower_export.checkpoint.remarks import remarks
from trtower_export.console import LoggedProgress, Progress
from trtower_export.graph.cost import measure_graph, measure_module
from trtower_export.graph.onnx_graph import write_onnx
from trtower_export.graph.truncate import TruncatedTower, release, truncate
from trtower_export.plan.build import obtain_plan
from trtower_export.plan.polygraphy import PLAN_OVERHEAD_MIB
from trtower_export.plan.targets import Target, choose_target, describe_plan
from trtower_export.precision.quantisation import calibrate, load_modelopt, write_quantised
from trtower_export.precision.search import find_islands, left_in_half, trace_with_islands

AUTO = "auto"
ENGINES = Path("engines")

CHECK_PHOTOGRAPHS = 2
"""Photographs in the check that ends an export: enough to find a wrong graph; `trtower check` takes them all."""


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
        if self.images is not None and not self.check and self.precision not in (AUTO, *EIGHT_BIT):
            raise ConfigError(f"--images is read by the check, and precision {self.precision} reads none without it.")
        if self.keep_fp32 and self.precision == "fp32":
            raise ConfigError("--keep-fp32 is for half precision; with --precision fp32 every operation is in FP32.")
        if self.keep_fp16 is not None and self.precision not in EIGHT_BIT:
            raise ConfigError(
                f"--keep-fp16 is for {' and '.join(EIGHT_BIT)}; precision {self.precision} was asked for."
            )


def export_tower(
    source: str,
    out: Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint into a bundle, which exists whole or not at all.

    ``source``: a hub id, a folder, an OpenCLIP file, or a recipe's name. ``out`` is engines/NAME unless given. The
    bundle's certificate says whether the check passed. Raises ConfigError, BundleError and MissingExtraError before any
    work, and CheckpointError and BuildError in the course of it.
    """
    options, progress = options or ExportOptions(), progress or LoggedProgress()
    precision = "fp16" if options.precision == AUTO else options.precision
    target, choice = choose_target(options.flavour, options.compute_capabilities, precision)
    if precision in EIGHT_BIT:
        load_modelopt(precision)  # so that its absence is no surprise later
    photographs = _photographs(options, progress)
    checkpoint = open_checkpoint(
        source,
        random_weights=options.random_weights,
        revision=options.revision,
        trust=options.trust,
        tower=options.tower,
    )
    spec = checkpoint.spec(options.select_layer, options.select_feature, options.image_size)
    profiles = options.profiles or (checkpoint.recipe.batch if checkpoint.recipe else DEFAULT_BATCH,)
    batch = merge_profiles(profiles)
    input_, output = spec.input(precision), spec.output(precision)
    out = out or ENGINES / (checkpoint.name + (".rehearsal" if checkpoint.random_weights else ""))
    refuse_existing(out, overwrite=options.overwrite)
    preprocessor = fit_preprocessor(checkpoint, spec.image_size, progress)
    progress.say(checkpoint.describe())
    progress.say(f"reads {spec.reading}, at {spec.image_size} pixels in {precision}; {choice}")
    for remark in remarks(checkpoint, spec, layer_asked=options.select_layer is not None):
        progress.say(remark)

    with disk_errors(out), staged(out, overwrite=options.overwrite) as folder:
        with progress.step(f"{'Draw' if checkpoint.random_weights else 'Load'} weights"):
            model = checkpoint.load_model(spec)
            full = measure_module(model, checkpoint.family, spec.image_size)
            weights = hash_weights(model, spec)
            tower = truncate(model, checkpoint.family, spec)
            del model  # its dead layers with it
        _check_space(tower, precision, folder, plans=target is not None)
        keep, quantise, calibration = options.keep_fp32, None, None
        images = prepare(photographs.images, ImageProcessor(preprocessor)) if photographs else []
        if options.precision == AUTO:
            drawn = prepare(draw_images(spec.image_size), ImageProcessor(preprocessor))
            keep = find_islands(tower, spec, {PHOTOGRAPH: images, DRAWN: drawn}, progress, always=keep)
        with progress.step("Trace"):
            program, kept = trace_with_islands(tower, spec, precision, batch, keep, spare=precision in EIGHT_BIT)
        if precision in EIGHT_BIT and photographs:
            with progress.step(f"Calibrate {precision} on {len(images)} images"):
                leave = left_in_half(program, precision, options.keep_fp16).union(kept)
                scales = calibrate(tower, precision, images, leave)
            quantise = partial(write_quantised, precision=precision, scales=scales)
            calibration = Calibration(layers=len(scales), images=len(images), images_sha256=photographs.sha256)
        with progress.step("Write ONNX"):
            write_onnx(program, input_, output, folder / GRAPH, islands=bool(kept), quantise=quantise)
        release(tower)
        if options.precision == AUTO or kept:
            progress.say(f"in FP32: {', '.join(kept) or 'nothing, FP16 holds the bounds as it is'}")
        checkpoint.config_at(spec.image_size).to_json_file(folder / CONFIG, use_diff=False)
        (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            schema=SCHEMA,
            name=out.name,
            trtower=trtower.__version__,
            spec=spec,
            full=full,
            cut=measure_graph(folder / GRAPH),
            source=Source(
                checkpoint=checkpoint.source,
                revision=checkpoint.revision,
                weights_sha256=weights,
                random_weights=checkpoint.random_weights,
                image_aspect_ratio=image_aspect_ratio(checkpoint),
                tower=checkpoint.tower,
            ),
            precision=precision,
            keep_fp32=kept,
            calibration=calibration,
            input=input_,
            output=output,
            profiles=profiles,
            files={name: describe(folder / name) for name in (GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR)},
            plans=(),
            versions={m.__name__: m.__version__ for m in (torch, transformers, onnx, onnxscript)},
            certificates=(),
        )
        progress.say(f"keeps {manifest.cut.describe_cut(manifest.full, manifest.precision)}")
        if target:
            manifest = _add_first_plan(Bundle(folder, manifest), target, progress, options.store)
        write_manifest(folder, manifest)

    bundle = Bundle.open(out)
    if not options.check or photographs is None:
        return bundle
    progress.say(f"{out} is complete; the check follows")
    return check_bundle(bundle, checkpoint, photographs.first(CHECK_PHOTOGRAPHS), progress, quick=True)


def check_bundle(
    bundle: Bundle, checkpoint: Checkpoint, photographs: Photographs, progress: Progress, **options: Any
) -> Bundle:
    """Certify a bundle (see `certify`, which takes ``options``) and write the certificate into it, passed or not."""
    if not os.access(bundle.path, os.W_OK):
        raise BundleError(f"{bundle.path} is read-only, and its certificate is written into it: check a copy of it.")
    certificate = certify(bundle, checkpoint, photographs, progress=progress, **options)
    with disk_errors(bundle.path), locked(bundle.path):
        return bundle.add_certificate(certificate)


def _photographs(options: ExportOptions, progress: Progress) -> Photographs | None:
    """Load the images that a calibration, a search or the check needs: those that were named, else the demo's."""
    calibrates = options.precision in EIGHT_BIT
    needs_all = calibrates or options.precision == AUTO
    if not options.check and not needs_all:
        return None
    photographs = load_photographs(options.images, limit=None if needs_all else CHECK_PHOTOGRAPHS)
    say_skipped(photographs, progress)
    if calibrates and options.images is None:
        progress.say(
            f"WARNING: {options.precision} is calibrated on {len(photographs.images)} photographs of the demo: name "
            "some that are like those the tower will see, with --images"
        )
    return photographs


def _add_first_plan(bundle: Bundle, target: Target, progress: Progress, store: Path | None) -> Manifest:
    """Put a plan into a bundle that is not complete yet, and give its manifest with it."""
    entry, manifest = describe_plan(target), bundle.manifest
    with TemporaryDirectory(dir=bundle.path.parent) as temporary:
        stored = obtain_plan(bundle, target, progress, store or Path(temporary))
        stored.copy_to(bundle.path / entry.file, bundle.path / entry.log)
    added = {name: describe(bundle.path / name) for name in (entry.file, entry.log)}
    return replace(manifest, plans=(entry,), files={**manifest.files, **added})


def _check_space(tower: TruncatedTower, precision: str, folder: Path, *, plans: bool) -> None:
    """Refuse a disk that cannot hold what is about to be written."""
    graph = sum(parameter.numel() for parameter in tower.parameters()) * PRECISIONS[precision].itemsize
    needed = graph * (2 if plans else 1) + (PLAN_OVERHEAD_MIB * MIB if plans else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"{folder.parent} has {free / MIB:.0f} MiB free; this bundle needs about {needed / MIB:.0f} MiB: "
            "free some, or name another disk with --out."
        )
