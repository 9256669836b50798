"""Compose the commands that messages suggest as the next step."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from trtower.bundle.bundle import Bundle
from trtower.layer_codes import LayerCode, name_layer
from trtower.spec import DEFAULT_BATCH, TowerSpec


def name_layers(spec: TowerSpec, layers: Sequence[int]) -> list[str]:
    """Name hidden states in the way that `--select-layer` accepts."""
    return [name_layer(layer, spec.num_layers) for layer in layers]


def export_command(bundle: Bundle, select_layer: LayerCode, image_size: int) -> str:
    """Return the command that exports a bundle like this one with other layers and another image size."""
    spec, source = bundle.manifest.spec, bundle.manifest.source
    layers = str(select_layer) if isinstance(select_layer, (int, str)) else ",".join(map(str, select_layer))
    command = ["trtower", "export", source.checkpoint, f"--select-layer={layers}"]
    command += ["--select-feature", spec.select_feature, "--image-size", str(image_size), *_build_options(bundle)]
    command += ["--random-weights"] if source.random_weights else []
    command += ["--revision", source.revision] if source.revision else []
    command += ["--tower", source.tower] if source.tower else []
    size = "" if image_size == spec.image_size else f"-{image_size}"
    return shlex.join([*command, "--out", f"{bundle.path}{size}-layer{layers}"])


def export_command_of(checkpoint: str, bundle: Bundle) -> str:
    """Return the command that exports another checkpoint with the options of this bundle, into a folder beside it."""
    return shlex.join(["trtower", "export", checkpoint, *_build_options(bundle), "--out", f"{bundle.path}-own"])


def build_command(bundle: Path, flavour: str, compute_capabilities: Sequence[str]) -> str:
    """Return the command that adds a plan to a bundle that has none."""
    command = ["trtower", "build", str(bundle), *([] if flavour == "auto" else ["--flavour", flavour])]
    return shlex.join([*command, *(each for one in compute_capabilities for each in ("--compute-capability", one))])


def _build_options(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    options = ["--precision", manifest.precision]
    options += ["--keep-fp32", ",".join(manifest.keep_fp32)] if manifest.keep_fp32 else []
    options += [] if manifest.plans else ["--flavour", "none"]
    if manifest.profiles != (DEFAULT_BATCH,):
        options += [each for p in manifest.profiles for each in ("--batch", f"{p.min},{p.opt},{p.max}")]
    return options
