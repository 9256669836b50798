"""Write BUILD.md: how to build a bundle's plan where it is served, with trtower or with stock tools."""

import json
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trtower.bundle.manifest import GOLDEN, GRAPH, PREPROCESSOR, Deployment, Manifest
from trtower.bundle.suggest import build_command
from trtower.spec import BatchProfile
from trtower_export.targets import Target
from trtower_export.targets.faults import find_faults

NEEDS_CUDA_13 = "It needs a driver for CUDA 13, 580 or later.\n\n"
IN_A_CONTAINER = (
    "pip brings a torch for CUDA 13, which needs driver 580 or later. With an older driver, install one for CUDA 12 "
    "first: `pip install torch --index-url https://download.pytorch.org/whl/cu128`.\n\n"
)
OF_A_JETPACK = (
    "PyPI's torch may not see the GPU of a Jetson. Which one does depends on its JetPack: export with `--target "
    "jetpack-...`, and this page names it.\n\n"
)
STOPS = "`trtower build` stops if this TensorRT is known to make such a plan useless, and warns of other reports. "
SEE_GPU = 'python3 -c "import torch; print(torch.cuda.get_device_name())"'

PAGE = resources.files(__package__).joinpath("build_notes.md").read_text(encoding="utf-8")


def write_instructions(manifest: Manifest, target: Target | None) -> str:
    """Return the text of BUILD.md."""
    name = manifest.name
    container = ""
    if target and target.container:
        run = ["docker", "run", "--rm", "-it", "--gpus", "all", "-v", '"$PWD:/engines"', "-w", "/engines"]
        container = f"```sh\n{' '.join([*run, target.container])}\n```\n\nInside:\n\n"
    return PAGE.format(
        name=name,
        quoted=shlex.quote(name),
        graph=GRAPH,
        first=manifest.first_tensorrt,
        where=_describe(target),
        faults=_list_faults(manifest, target) if target else "",
        container=container,
        build="\n".join(_build(manifest, target)),
        torch=_describe_torch(target),
        stops="" if _is_rtx(target) else STOPS,
        unless=" unless its weights are random" if manifest.source.random_weights else "",
        path=json.dumps(name, ensure_ascii=False),  # valid Python, too
        backend=target.flavour if target else "tensorrt",
        polygraphy=_wrap(polygraphy_command(manifest)),
        trtexec=_wrap(trtexec_command(manifest)),
        pixels=_describe_pixels(manifest),
        output=manifest.output.name,
        prefix=_describe_prefix(manifest.spec.num_prefix_tokens),
        verify=shlex.join(["trtower", "verify", name, "--backend", target.flavour if target else "tensorrt"]),
        check="\n".join(_check(manifest, target)),
        golden=GOLDEN,
    )


def _list_faults(manifest: Manifest, target: Target) -> str:
    """List the known faults that the target's TensorRT may have for this bundle."""
    faults = find_faults(*target.where, manifest.spec.family, manifest.precision)
    if not faults:
        return ""
    lines = [f"- {fault}. Instead: {fault.instead}." for fault in faults]
    return "\n".join(["", "Others have reported faults of this TensorRT that may concern this bundle:", "", *lines, ""])


def _describe(target: Target | None) -> str:
    if target is None:
        return "No target was named at export; `trtower targets` lists those that are known."
    brings = [f"TensorRT {target.tensorrt}"] if target.tensorrt else []
    brings += [f"CUDA {target.cuda}"] if target.cuda else []
    brings += [target.platform] if target.platform else []
    brings += [f"compute capability {' or '.join(target.compute_capabilities)}"] if target.compute_capabilities else []
    note = f" ({target.note})" if target.note else ""
    return f"It was exported for `{target.name}`, {target.title}: {', '.join(brings)}{note}. Source: {target.source}"


def _describe_torch(target: Target | None) -> str:
    """Say what the torch that pip brings needs."""
    if target is None or not (target.torch or target.brings_tensorrt or target.container):
        return NEEDS_CUDA_13
    if target.torch:
        return ""
    return IN_A_CONTAINER if target.container else OF_A_JETPACK


def _is_rtx(target: Target | None) -> bool:
    return target is not None and target.flavour == "tensorrt-rtx"


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


def _describe_pixels(manifest: Manifest) -> str:
    """Say what the engine's input is."""
    input_, shape = manifest.input, ", ".join(map(str, manifest.input.shape))
    if manifest.spec.takes_floats:
        return (
            f"`{input_.name}` ({shape}) has the type {input_.dtype}: normalised pixels, as `{PREPROCESSOR}` describes"
        )
    return (
        f"`{input_.name}` ({shape}) has the type {input_.dtype}: RGB, resized and cropped as `{PREPROCESSOR}` "
        "describes; the engine rescales and normalises them itself"
    )


def _describe_prefix(tokens: int) -> str:
    if not tokens:
        return ""
    return (
        ", of which the first belongs to no patch"
        if tokens == 1
        else f", of which the first {tokens} belong to no patch"
    )


def _wrap(command: Sequence[str]) -> str:
    """Write a command over several lines, one for each option."""
    lines = [[command[0]]]
    for part in command[1:]:
        if part.startswith("-"):
            lines.append([])
        lines[-1].append(part)
    return " \\\n  ".join(map(shlex.join, lines))


def _build(manifest: Manifest, target: Target | None) -> list[str]:
    """Return the commands that install trtower and add a plan. A TensorRT that is there already is not installed."""
    deployment = manifest.target or Deployment(name="", flavour="tensorrt")
    command = build_command(
        Path(manifest.name),
        deployment.flavour,
        compute_capabilities=deployment.compute_capabilities if _is_rtx(target) else (),
        accept_known_faults=deployment.accept_known_faults,
    )
    lines = [] if target and target.container else [_venv(target)]
    lines += [f"pip install {target.torch}"] if target and target.torch else []
    return [*lines, _install(manifest, _extra(target)), SEE_GPU, command]


def _extra(target: Target | None) -> str:
    if _is_rtx(target):
        return "trt-rtx-build"
    return "build" if target and _has_tensorrt(target) else "trt-build"


def _has_tensorrt(target: Target) -> bool:
    return bool(target.tensorrt or target.brings_tensorrt)


def _venv(target: Target | None) -> str:
    """Return the command that makes an environment. It sees the system's TensorRT only if it is told to."""
    options = " --system-site-packages" if target and _has_tensorrt(target) else ""
    return f"python3 -m venv{options} .venv && . .venv/bin/activate"


def _check(manifest: Manifest, target: Target | None) -> list[str]:
    command = ["trtower", "check", manifest.name, "--backend", target.flavour if target else "tensorrt"]
    command += ["--checkpoint", "CHECKPOINT"] if Path(manifest.source.checkpoint).is_absolute() else []
    return [_install(manifest, f"export,demo,{_extra(target)}"), shlex.join(command)]


def _install(manifest: Manifest, extra: str) -> str:
    return f"pip install './trtower-{manifest.trtower}-py3-none-any.whl[{extra}]'"
