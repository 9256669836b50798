"""From a checkpoint to a bundle: the whole story. A reader starts here.

checkpoint -> truncate -> onnx_graph -> engine -> bundle -> parity
"""

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnxscript
import torch
import transformers

import trtower
from trtower.bundle import (
    CONFIG,
    GRAPH,
    GRAPH_DATA,
    PREPROCESSOR,
    Bundle,
    describe,
    disk_errors,
    locked,
    refuse_existing,
    staged,
    write_manifest,
)
from trtower.errors import BuildError, BundleError, ConfigError
from trtower.inspection import describe_cut
from trtower.layer_codes import LayerCode
from trtower.manifest import SCHEMA, Manifest, Source
from trtower.spec import PRECISIONS, BatchProfile
from trtower_export.checkpoint import Checkpoint, open_checkpoint
from trtower_export.cost import measure_graph, measure_module
from trtower_export.engine import MIB, PLAN_OVERHEAD_MIB, build_plan, choose_target
from trtower_export.layouts import Trust
from trtower_export.onnx_graph import write_onnx
from trtower_export.parity import Comparison, certify
from trtower_export.photographs import Photographs, load_photographs
from trtower_export.preprocessor import fit_preprocessor
from trtower_export.progress import LoggedProgress, Progress
from trtower_export.truncate import TruncatedTower, release, truncate, weights_sha256

ENGINES = Path("engines")
DEFAULT_BATCH = BatchProfile(min=1, opt=8, max=32)

CHECK_PHOTOGRAPHS = 2
"""Photographs in the check that ends an export: enough to find a wrong graph; `trtower check` takes them all."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make of a checkpoint. None takes what the checkpoint says, or its recipe, or the default."""

    select_layer: LayerCode | None = None
    select_feature: str | None = None
    image_size: int | None = None
    precision: str = "fp16"
    batch: BatchProfile | None = None
    flavour: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    random_weights: bool = False
    revision: str | None = None
    trust: Trust = field(default_factory=Trust)
    overwrite: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is unknown: {', '.join(PRECISIONS)} are known.")


def export_tower(
    source: str,
    out: Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint into a bundle, which exists whole or not at all.

    ``source``: a hub id, a folder, an OpenCLIP file, or a recipe's name. ``out`` is engines/NAME unless given. The
    bundle's certificate says whether the check passed. Raises ConfigError and BundleError before any work, and
    CheckpointError and BuildError in the course of it.
    """
    options, progress = options or ExportOptions(), progress or LoggedProgress()
    target, choice = choose_target(options.flavour, options.compute_capabilities, options.precision)
    photographs = load_photographs(None, limit=CHECK_PHOTOGRAPHS) if options.check else None
    checkpoint = open_checkpoint(
        source, random_weights=options.random_weights, revision=options.revision, trust=options.trust
    )
    spec = checkpoint.spec(options.select_layer, options.select_feature, options.image_size)
    batch = options.batch or (checkpoint.recipe.batch if checkpoint.recipe else DEFAULT_BATCH)
    input_, output = spec.input(options.precision), spec.output(options.precision)
    out = out or ENGINES / (checkpoint.name + (".rehearsal" if checkpoint.random_weights else ""))
    refuse_existing(out, overwrite=options.overwrite)
    preprocessor = fit_preprocessor(checkpoint, spec.image_size, progress)
    progress.say(checkpoint.describe())
    progress.say(f"reads {spec.reading}, at {spec.image_size} pixels in {options.precision}; {choice}")

    with disk_errors(out), staged(out, overwrite=options.overwrite) as folder:
        with progress.step(f"{'Draw' if checkpoint.random_weights else 'Load'} weights"):
            model = checkpoint.load_model(spec)
            full = measure_module(model, checkpoint.family, spec.image_size)
            tower = truncate(model, checkpoint.family, spec)
            del model  # its dead layers with it
            weights = weights_sha256(tower)
        _check_space(tower, options.precision, folder, plans=target is not None)
        with progress.step("Trace to ONNX"):
            write_onnx(tower, input_, output, batch, folder / GRAPH)
        release(tower)
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
            ),
            precision=options.precision,
            input=input_,
            output=output,
            batch=batch,
            files={name: describe(folder / name) for name in (GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR)},
            plans=(),
            versions={m.__name__: m.__version__ for m in (torch, transformers, onnx, onnxscript)},
            certificate=None,
        )
        progress.say(f"keeps {describe_cut(manifest.full, manifest.cut, manifest.precision)}")
        if target:
            with progress.step(f"Build the {target.flavour} plan") as step:
                entry, plan = build_plan(folder / GRAPH, target, input_, batch, folder, step)
            manifest = replace(manifest, plans=(entry,), files={**manifest.files, entry.file: describe(plan)})
        write_manifest(folder, manifest)

    bundle = Bundle.open(out)
    if photographs is None:
        return bundle
    progress.say(f"{out} is complete; the check follows")
    return check_bundle(bundle, checkpoint, photographs, progress)


def check_bundle(
    bundle: Bundle,
    checkpoint: Checkpoint,
    photographs: Photographs,
    progress: Progress,
    *,
    backend: str = "auto",
    compare: Comparison | None = None,
) -> Bundle:
    """Certify a bundle (see `certify`) and write the certificate into it, passed or not."""
    if not os.access(bundle.path, os.W_OK):
        raise BundleError(f"{bundle.path} is read-only, and its certificate is written into it: check a copy of it.")
    certificate = certify(bundle, checkpoint, photographs, backend=backend, progress=progress, compare=compare)
    with disk_errors(bundle.path), locked(bundle.path):
        return bundle.add_certificate(certificate)


def _check_space(tower: TruncatedTower, precision: str, folder: Path, *, plans: bool) -> None:
    """Refuse a disk that cannot hold what is about to be written."""
    itemsize = getattr(torch, PRECISIONS[precision]).itemsize
    graph = sum(parameter.numel() for parameter in tower.parameters()) * itemsize
    needed = graph * (2 if plans else 1) + (PLAN_OVERHEAD_MIB * MIB if plans else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"{folder.parent} has {free / MIB:.0f} MiB free; this bundle needs about {needed / MIB:.0f} MiB: "
            "free some, or name another disk with --out."
        )
