"""Describe a bundle: what it is, which plans it has, what would run here and why the others would not."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH, GRAPH_DATA, TO_PAD, BuildSettings, PlanEntry, TowerCost
from trtower.runners.choose import Candidate, auto_choice, candidates
from trtower.runners.device import default_device
from trtower.runners.tensorrt import plan_verdicts
from trtower.spec import EIGHT_BIT, MB, PRECISIONS, TowerSpec


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return the whole description as JSON has it. Files are hashed; none is executed or deserialised.

    Of "backends", the row that `auto` would open here has "auto": true; none has if that one's files were altered,
    because `auto` then raises.
    """
    manifest, altered = bundle.manifest, bundle.altered()
    found = candidates(bundle)
    choice = auto_choice(found)
    rows = [
        {
            "backend": c.backend,
            "file": c.file,
            "device": str(c.device),
            "runs": c.obstacle is None,
            "obstacle": c.obstacle,
            "reservation": c.reservation,
            "auto": c is choice,
        }
        for c in (_without_altered(c, altered) for c in found)
    ]
    data = dataclasses.asdict(manifest)
    return {
        "path": str(bundle.path),
        **{key: data[key] for key in ("name", "schema", "trtower", "spec", "full", "cut", "source")},
        **{key: data[key] for key in ("precision", "keep_fp32", "calibration", "input", "output")},
        "batch": dataclasses.asdict(manifest.batch),
        "profiles": data["profiles"],
        "hidden_size": manifest.spec.hidden_size,
        "num_patches": manifest.spec.num_patches,
        "plans": [
            {**each, "size": manifest.files[plan.file].size, "verdicts": _plan_verdicts(bundle, plan, altered)}
            for each, plan in zip(data["plans"], manifest.plans, strict=True)
        ],
        "size": sum(entry.size for entry in manifest.files.values()),
        "versions": data["versions"],
        "backends": rows,
        "certificates": [
            {**each, "void": bundle.changed_since(certificate, altered)}
            for each, certificate in zip(data["certificates"], manifest.certificates, strict=True)
        ],
        "altered": altered,
    }


def _plan_verdicts(bundle: Bundle, plan: PlanEntry, altered: list[str]) -> dict[str, str | None]:
    """Say of everything that a plan needs why it is not met here; None where it is."""
    spoilt = [name for name in _files_of(plan) if name in altered]
    return {
        **plan_verdicts(plan, default_device("cuda")),
        "certificate": bundle.why_uncertified(plan.flavour, [plan.file], altered),
        "sha256": f"{', '.join(spoilt)} was altered: copy the bundle again" if spoilt else None,
    }


def _files_of(plan: PlanEntry | None) -> list[str]:
    """List what is read to run a plan, or the graph."""
    if plan is None:
        return [GRAPH, GRAPH_DATA]
    return [plan.file, GRAPH, GRAPH_DATA] if plan.settings.stripped else [plan.file]


def _without_altered(candidate: Candidate, altered: list[str]) -> Candidate:
    spoilt = [name for name in _files_of(candidate.plan) if name in altered]
    if candidate.obstacle or not spoilt:
        return candidate
    return dataclasses.replace(candidate, obstacle=f"{', '.join(spoilt)} was altered: copy the bundle again")


def as_text(found: dict[str, Any], *, why: bool = False) -> str:
    """Put a description into words; with ``why``, what each plan needs and whether it is met here."""
    spec, source, batch = found["spec"], found["source"], found["batch"]
    tuned = " and ".join(dict.fromkeys(str(profile["opt"]) for profile in found["profiles"]))
    weights = "RANDOM WEIGHTS: a rehearsal, its features mean nothing" if source["random_weights"] else "pretrained"
    lines = [
        f"{found['name']}: {spec['family']} tower from {source['checkpoint']}",
        f"  weights      {weights} (sha256 {source['weights_sha256']['float32'][:12]}…)",
        f"  reads        {TowerSpec(**spec).reading}",
        f"  keeps        {describe_cut(TowerCost(**found['full']), TowerCost(**found['cut']), found['precision'])}",
        f"  precision    {describe_precision(found['precision'], found['keep_fp32'], found['calibration'])}",
        f"  pixel_values {_shape(found['input'])}, batch {batch['min']} to {batch['max']}, best at {tuned}",
        *([f"  pictures     by {source['image_aspect_ratio']}: {TO_PAD}"] if source["image_aspect_ratio"] else []),
        f"  features     {found['num_patches']} patches of {found['hidden_size']}",
        f"  on disk      {found['size'] / MB:.0f} MB, made by trtower {found['trtower']}",
        "  plans",
    ]
    for plan in found["plans"]:
        gpus = ", ".join(plan["compute_capabilities"]) or f"8.0 and later, as far as {plan['flavour']} supports them"
        settings = describe_settings(BuildSettings(**plan["settings"]))
        lines.append(f"    {plan['file']} ({plan['size'] / MB:.0f} MB) for compute capability {gpus}, built {settings}")
        if why:
            lines += [f"      {what:<18} {obstacle or 'met'}" for what, obstacle in plan["verdicts"].items()]
    if not found["plans"]:
        lines.append(f"    none: trtower build {found['path']}")
    if found["altered"]:
        lines.append(f"  ALTERED      {', '.join(found['altered'])}: copy the bundle again")
    lines.append("  here")
    plans = [plan["file"] for plan in found["plans"]]
    several_plans = len(plans) > 1
    for row in found["backends"]:
        verdict = row["obstacle"] or f"on {row['device']}"
        if row["auto"]:
            verdict += ", and auto takes it"
        if row["runs"] and row["reservation"]:
            verdict += f"{', although' if row['auto'] else ', and auto takes another:'} {row['reservation']}"
        if several_plans and row["file"] in plans and not verdict.startswith(row["file"]):
            verdict = f"{row['file']}: {verdict}"
        lines.append(f"    {'runs' if row['runs'] else 'not '} {row['backend']:<17} {verdict}")
    lines += [f"  certificate  {_certificate(found, each)}" for each in found["certificates"]]
    if not found["certificates"]:
        lines.append(f"  certificate  none: trtower check {found['path']} makes one")
    elif not_run := _not_run(found):
        lines.append(f"  NOT run      {', '.join(not_run)}: built, and checked on no GPU")
    return "\n".join(lines)


def describe_cut(full: TowerCost, cut: TowerCost, precision: str) -> str:
    """Say in one line what is left of a tower, and how much that is in this precision."""
    megabytes = ""
    if precision not in EIGHT_BIT:  # in which the size depends on the layers that are
        size = PRECISIONS[precision].itemsize / MB
        megabytes = f" ({cut.parameters * size:.0f} of {full.parameters * size:.0f} MB)"
    return (
        f"{cut.layers} of {full.layers} layers, "
        f"{cut.parameters / 1e6:.1f} of {full.parameters / 1e6:.1f} M parameters{megabytes}, "
        f"{cut.flop / 1e9:.1f} of {full.flop / 1e9:.1f} GFLOP an image"
    )


def describe_precision(precision: str, keep_fp32: Sequence[str], calibration: dict[str, Any] | None) -> str:
    """Say in one line what is computed in what."""
    says = [precision]
    if calibration:
        says.append(f"{calibration['layers']} linear layers, calibrated on {calibration['images']} images")
    if keep_fp32:
        says.append(f"in FP32 {', '.join(keep_fp32)}")
    return ", ".join(says)


def describe_settings(settings: BuildSettings) -> str:
    """Say in a few words how a plan was built."""
    says = []
    if settings.optimization_level is not None:
        says.append(f"at optimization level {settings.optimization_level}")
    if settings.workspace_mib is not None:
        says.append(f"with {settings.workspace_mib} MiB of workspace")
    says += ["hardware-compatible"] if settings.hardware_compatible else []
    says += ["without its weights"] if settings.stripped else []
    return ", ".join(says) or "with TensorRT's own settings"


def describe_loading(bundle: Path) -> str:
    """Return the Python lines that load a bundle: as a tower, and into a model around it."""
    path = json.dumps(str(bundle), ensure_ascii=False)  # which is Python, too
    return (
        "Load it:\n"
        "  from trtower import VisionTower\n"
        f"  tower = VisionTower.load({path})\n"
        "or put it into a loaded model that has this tower:\n"
        "  import trtower\n"
        f"  trtower.install(model, {path})"
    )


def describe_run(ran: str, backend: str, gpu: str | None) -> str:
    """Say what a check executed, and where."""
    subject = "the plan was run" if ran == "plan" else "the ONNX graph was run"
    return f"{subject} on {backend}, {gpu or 'not run on a GPU'}"


def describe_figure(value: float | None) -> str:
    """Write one of a certificate's figures: six places of a cosine, three digits of an error."""
    if value is None:
        return "not finite"
    return f"{value:.6f}" if abs(value) >= 0.1 else f"{value:.2e}"


def _certificate(found: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Say in one line what a certificate proves."""
    if certificate["void"]:
        next_step = "" if found["altered"] else f": trtower check {found['path']} --backend {certificate['backend']}"
        return f"of {certificate['backend']} is void: {', '.join(certificate['void'])} changed since{next_step}"
    verdict = "passed" if certificate["passed"] else "FAILED"
    figures = certificate["bundle"]
    batches = ", ".join(str(each["batch"]) for each in certificate["batches"])
    return (
        f"{verdict} on {certificate['date']}, {len(certificate['images'])} images, {batches} at once: "
        f"{describe_run(certificate['ran'], certificate['runner'], certificate['gpu'])}; "
        f"token cosine {describe_figure(figures['token_cosine_min'])} at least, "
        f"relative error {describe_figure(figures['relative_error'])}"
    )


def _not_run(found: dict[str, Any]) -> list[str]:
    """List the plans that no check has executed."""
    seen = {*found["altered"], *(name for each in found["certificates"] for name in each["executed"])}
    return [plan["file"] for plan in found["plans"] if plan["file"] not in seen]


def _shape(tensor: dict[str, Any]) -> str:
    return f"({', '.join(map(str, tensor['shape']))}) {tensor['dtype']}"
