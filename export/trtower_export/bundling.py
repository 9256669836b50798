"""Complete a bundle: check the disk for room, and write what lies beside the graph."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
import transformers
from torch import nn

import trtower
from trtower.bundle.manifest import (
    BUILD_NOTES,
    CONFIG,
    FUSED_GRAPH,
    GOLDEN,
    GRAPH,
    GRAPH_DATA,
    PREPROCESSOR,
    SCHEMA,
    Manifest,
    Source,
)
from trtower.bundle.staging import describe, write_manifest
from trtower.errors import BuildError
from trtower.spec import MIB, PRECISIONS, BatchProfile, TowerSpec
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.checkpoint.preprocessor import image_aspect_ratio
from trtower_export.console import Progress
from trtower_export.graph.cost import measure_graph
from trtower_export.graph.load import LoadedTower
from trtower_export.options import ExportOptions
from trtower_export.plan.parsing import check_parsers, find_parsers
from trtower_export.plan.polygraphy import PLAN_OVERHEAD_MIB
from trtower_export.precision.program import TracedTower
from trtower_export.targets import Target
from trtower_export.targets.instructions import write_instructions

FILES = (GRAPH, FUSED_GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR, GOLDEN)


def check_space(tower: nn.Module, precision: str, folder: Path, *, plans: bool) -> None:
    """Refuse a disk that cannot hold what is about to be written. Raises BuildError."""
    itemsize = PRECISIONS[precision].itemsize
    graph = sum(parameter.numel() for parameter in tower.parameters()) * itemsize
    needed = graph * (2 if plans else 1) + (PLAN_OVERHEAD_MIB * MIB if plans else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"{folder.parent} has {free / MIB:.0f} MiB free; this bundle needs about {needed / MIB:.0f} MiB: "
            "free some, or name another disk with --out."
        )


def write_bundle(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    spec: TowerSpec,
    profiles: tuple[BatchProfile, ...],
    preprocessor: dict[str, Any],
    loaded: LoadedTower,
    traced: TracedTower,
    target: Target | None,
    options: ExportOptions,
    progress: Progress,
) -> None:
    """Write all that a bundle has besides its graphs, the manifest last.

    ``folder`` already holds the graphs. Raises ConfigError if the graph does not match ``spec``, or needs a newer
    TensorRT than ``target`` has.
    """
    parsers = find_parsers(folder / GRAPH)
    check_parsers(parsers, target, progress)
    checkpoint.config_at(spec.image_size).to_json_file(folder / CONFIG, use_diff=False)
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")
    input_, output = spec.input(traced.precision), spec.output(traced.precision)
    loaded.golden.write(folder / GOLDEN, input_, output)
    manifest = Manifest(
        schema=SCHEMA,
        name=name,
        trtower=trtower.__version__,
        spec=spec,
        full=loaded.full,
        cut=measure_graph(folder / GRAPH, loaded.flop),
        source=Source(
            checkpoint=checkpoint.source,
            revision=checkpoint.revision,
            weights_sha256=loaded.hashing.result(),
            random_weights=checkpoint.random_weights,
            image_aspect_ratio=image_aspect_ratio(checkpoint),
            tower=checkpoint.tower,
            head_sha256=loaded.head_sha256,
        ),
        precision=traced.precision,
        keep_fp32=traced.keep_fp32,
        calibration=traced.calibration,
        input=input_,
        output=output,
        profiles=profiles,
        files={},
        plans=(),
        versions={m.__name__: m.__version__ for m in (torch, transformers, onnx, onnxscript)},
        certificates=(),
        first_tensorrt=parsers.first,
        target=target.as_deployment(options.accept_known_faults) if target else None,
    )
    (folder / BUILD_NOTES).write_text(write_instructions(manifest, target), encoding="utf-8")
    manifest = replace(manifest, files={file: describe(folder / file) for file in FILES if (folder / file).exists()})
    write_manifest(folder, manifest)
    head = f", and the {spec.head.describe()}" if spec.head else ""
    progress.say(f"keeps {manifest.cut.describe_cut(manifest.full, manifest.precision)}{head}")
