"""Compose the commands that messages suggest as the next step."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GOLDEN, BuildSettings
from trtower.head import HeadSpec
from trtower.layer_codes import LayerCode, name_layer, parse_layer_code, read_layer_code
from trtower.spec import DEFAULT_BATCH, TowerSpec


def name_layers(spec: TowerSpec, layers: Sequence[int]) -> list[str]:
    """Name hidden states in the way that `--select-layer` accepts."""
    return [name_layer(layer, spec.num_layers) for layer in layers]


def export_command(bundle: Bundle, select_layer: LayerCode, image_size: int) -> str:
    """Return the command that exports a bundle like this one with other layers and another image size, and no head."""
    spec, source = bundle.manifest.spec, bundle.manifest.source
    layers = str(select_layer) if isinstance(select_layer, (int, str)) else ",".join(map(str, select_layer))
    indices, _ = read_layer_code(parse_layer_code(layers), spec.select_feature, spec.num_layers)
    headless, path = replace(spec, layers=indices, head=None), str(bundle.path)
    if path.endswith(spec.suffix):
        path = path.removesuffix(spec.suffix) + headless.suffix
    options = _build_options(bundle, headless)
    command = ["trtower", "export", source.checkpoint, f"--select-layer={layers}"]
    command += ["--select-feature", spec.select_feature, "--image-size", str(image_size), *options]
    command += ["--random-weights"] if source.random_weights else []
    command += ["--revision", source.revision] if source.revision else []
    command += ["--tower", source.tower] if source.tower else []
    size = "" if image_size == spec.image_size else f"-{image_size}"
    return shlex.join([*command, "--out", f"{path}{size}-layer{layers}"])


def export_command_of(checkpoint: str, bundle: Bundle) -> str:
    """Return the command that exports another checkpoint with the options of this bundle, into a folder beside it."""
    options = _build_options(bundle, bundle.manifest.spec)
    return shlex.join(["trtower", "export", checkpoint, *options, "--out", f"{bundle.path}-own"])


def build_command(
    bundle: Path,
    flavour: str,
    *,
    compute_capabilities: Sequence[str] = (),
    accept_known_faults: Sequence[str] = (),
    settings: BuildSettings | None = None,
) -> str:
    """Return the command that adds a plan to a bundle."""
    command = ["trtower", "build", str(bundle), "--flavour", flavour]
    command += _repeat("--compute-capability", compute_capabilities)
    command += _repeat("--accept-known-fault", accept_known_faults)
    return shlex.join(command + (settings.options() if settings else []))


def proof_command(bundle: Bundle, backend: str) -> str:
    """Return the command that proves a bundle on a backend: with its golden answers, or with PyTorch if it has none."""
    command = "verify" if GOLDEN in bundle.manifest.files else "check"
    return shlex.join(["trtower", command, str(bundle.path), "--backend", backend])


def _repeat(option: str, values: Sequence[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def _build_options(bundle: Bundle, spec: TowerSpec) -> list[str]:
    """Return the options that build a bundle of ``spec`` like this one."""
    manifest = bundle.manifest
    options = _head_options(spec.head) if spec.head else []
    options += [] if spec.takes_floats else ["--pixels", spec.pixels, "--layout", spec.layout]
    options += ["--precision", manifest.precision]
    kept = [name for name in manifest.keep_fp32 if _is_in(name, spec)]
    options += ["--keep-fp32", ",".join(kept)] if kept else []
    if target := manifest.target:
        options += ["--target", target.name, *_repeat("--compute-capability", target.compute_capabilities)]
        options += _repeat("--accept-known-fault", target.accept_known_faults)
    options += [] if manifest.plans else ["--flavour", "none"]
    if manifest.profiles != (DEFAULT_BATCH,):
        options += [each for p in manifest.profiles for each in ("--batch", f"{p.min},{p.opt},{p.max}")]
    return options


def _head_options(head: HeadSpec) -> list[str]:
    options = ["--head", head.kind, *(["--normalize"] if head.normalised else [])]
    return options + (["--pool", head.pool] if head.pool else [])


def _is_in(operation: str, spec: TowerSpec) -> bool:
    """Whether the tower of ``spec`` is deep enough to have an operation."""
    layer = re.match(r"layers\.(\d+)\.", operation)
    if layer:
        return int(layer[1]) < spec.depth
    if operation.startswith("head."):
        return spec.head is not None
    return operation != "final_norm" or spec.reads_final_norm


def how_to_certify(bundle: Bundle, backend: str) -> str:
    """Say what to do about a bundle for which no certificate can vouch (see `Bundle.uncertifiable`)."""
    if bundle.manifest.source.random_weights:
        return "Export the checkpoint itself, with its weights"
    return f"Check or verify it where it is served: {proof_command(bundle, backend)}"
