"""Write BUILD.md: how to build a bundle's plan where it is served, with trtower or with stock tools."""

import shlex
from collections.abc import Sequence
from importlib import resources

from trtower.bundle.manifest import GRAPH, Manifest
from trtower.spec import BatchProfile
from trtower_export.targets import Target
from trtower_export.targets.faults import Fault, find_faults

PAGE = resources.files(__package__).joinpath("build_notes.md").read_text(encoding="utf-8")


def write_instructions(manifest: Manifest, target: Target | None) -> str:
    """Return the text of BUILD.md."""
    name = manifest.name
    container = ""
    if target and target.container:
        run = ["docker", "run", "--rm", "-it", "--gpus", "all", "-v", '"$PWD:/engines"', "-w", "/engines"]
        container = f"```sh\n{' '.join([*run, target.container])}\n```\n\nInside:\n\n"
    source = manifest.source
    check = ["trtower", "check", name] + ([] if source.checkpoint else ["--checkpoint", "CHECKPOINT"])
    prefix = manifest.spec.num_prefix_tokens
    return PAGE.format(
        name=name,
        quoted=shlex.quote(name),
        graph=GRAPH,
        first=manifest.first_tensorrt,
        where=_describe(target),
        faults=_list_faults(manifest, target) if target else "",
        container=container,
        build=_build(manifest, target),
        polygraphy=_wrap(polygraphy_command(manifest)),
        trtexec=_wrap(trtexec_command(manifest)),
        input=manifest.input.name,
        dtype=manifest.input.dtype,
        output=manifest.output.name,
        prefix=prefix,
        belong="belongs" if prefix == 1 else "belong",
        check=shlex.join(check),
    )


def _find_faults(manifest: Manifest, target: Target) -> list[Fault]:
    where = (target.tensorrt, target.compute_capabilities, target.platform)
    return find_faults(*where, manifest.spec.family, manifest.precision)


def _list_faults(manifest: Manifest, target: Target) -> str:
    """List the known faults that the target's TensorRT may have for this bundle."""
    faults = _find_faults(manifest, target)
    if not faults:
        return ""
    lines = [f"- {fault}. Instead: {fault.instead}." for fault in faults]
    return "\n".join(["", "Others reported faults of this TensorRT that may concern this bundle:", "", *lines, ""])


def _describe(target: Target | None) -> str:
    if target is None:
        return "No target was named at export; `trtower targets` lists those that are known."
    brings = [f"TensorRT {target.tensorrt}"] if target.tensorrt else []
    brings += [f"CUDA {target.cuda}"] if target.cuda else []
    brings += [target.platform] if target.platform else []
    brings += [f"compute capability {' or '.join(target.compute_capabilities)}"] if target.compute_capabilities else []
    note = f" ({target.note})" if target.note else ""
    return f"It was exported for `{target.name}`, {target.title}: {', '.join(brings)}{note}. Source: {target.source}"


def polygraphy_command(manifest: Manifest) -> list[str]:
    """Return the command of Polygraphy that builds a plan."""
    command = ["polygraphy", "convert", f"{manifest.name}/{GRAPH}", "--convert-to", "trt", "--strongly-typed"]
    for each in manifest.profiles:
        for bound, batch in (("min", each.min), ("opt", each.opt), ("max", each.max)):
            shape = ",".join(map(str, (batch, *manifest.input.shape[1:])))
            command += [f"--trt-{bound}-shapes", f"{manifest.input.name}:[{shape}]"]
    return [*command, "-o", f"{manifest.name}.plan"]


def trtexec_command(manifest: Manifest) -> list[str]:
    """Return the command of trtexec that builds a plan. TF32 is off, because FP32 parts of a graph need all digits."""
    command = ["trtexec", f"--onnx={manifest.name}/{GRAPH}", "--stronglyTyped", "--noTF32"]
    several = len(manifest.profiles) > 1
    for index, profile in enumerate(manifest.profiles):
        command += [f"--profile={index}"] if several else []
        command += _shapes(manifest, profile)
    return [*command, "--skipInference", f"--saveEngine={manifest.name}.plan"]


def _shapes(manifest: Manifest, profile: BatchProfile) -> list[str]:
    rest = "x".join(map(str, manifest.input.shape[1:]))
    bounds = (("min", profile.min), ("opt", profile.opt), ("max", profile.max))
    return [f"--{bound}Shapes={manifest.input.name}:{batch}x{rest}" for bound, batch in bounds]


def _wrap(command: Sequence[str]) -> str:
    """Write a command over several lines, one for each option."""
    lines = [[command[0]]]
    for part in command[1:]:
        if part.startswith("-"):
            lines.append([])
        lines[-1].append(part)
    return " \\\n  ".join(map(shlex.join, lines))


def _build(manifest: Manifest, target: Target | None) -> str:
    """Return the commands that install trtower and add a plan. A TensorRT that is there already is not installed."""
    command = ["trtower", "build", manifest.name, "--flavour"]
    rtx = target.compute_capabilities if target and target.flavour == "tensorrt-rtx" else ()
    if rtx:
        capabilities = [part for each in rtx for part in ("--compute-capability", each)]
        return "\n".join([_install(manifest, "trt-rtx-build"), shlex.join([*command, "tensorrt-rtx", *capabilities])])
    has_tensorrt = target is not None and bool(target.tensorrt or target.brings_tensorrt)
    lines = [_install(manifest, "build" if has_tensorrt else "trt-build")]
    if target and has_tensorrt and not target.container:  # a venv sees the system's TensorRT only if it is told to
        lines.insert(0, "python3 -m venv --system-site-packages .venv && . .venv/bin/activate")
    # Only faults that the export stopped for: the build itself decides on those of a GPU that is not known here.
    where = (target.compute_capabilities, target.platform) if target else ()
    faults = _find_faults(manifest, target) if target else []
    accepted = [fault.name for fault in faults if fault.refuse and fault.is_certain(*where)]
    options = [part for name in accepted for part in ("--accept-known-fault", name)]
    return "\n".join([*lines, shlex.join([*command, "tensorrt", *options])])


def _install(manifest: Manifest, extra: str) -> str:
    return f"pip install './trtower-{manifest.trtower}-py3-none-any.whl[{extra}]'"
