"""Describe a bundle: what it is, which plans it has, what would run here and why the others would not."""

import dataclasses
from typing import Any

from trtower.bundle import Bundle
from trtower.manifest import Certificate
from trtower.runners.choose import candidates

MB = 1_000_000


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Give the whole description as JSON has it. Nothing of the bundle is executed or deserialised."""
    manifest = bundle.manifest
    rows = [
        {
            "backend": c.backend,
            "file": c.file,
            "device": str(c.device),
            "runs": c.obstacle is None,
            "obstacle": c.obstacle,
        }
        for c in candidates(bundle)
    ]
    data = dataclasses.asdict(manifest)
    return {
        "path": str(bundle.path),
        **{key: data[key] for key in ("name", "schema", "trtower", "spec", "source", "precision", "input", "output")},
        "batch": data["batch"],
        "hidden_size": manifest.spec.hidden_size,
        "num_patches": manifest.spec.num_patches,
        "plans": [{**plan, "size": manifest.files[plan["file"]].size} for plan in data["plans"]],
        "size": sum(entry.size for entry in manifest.files.values()),
        "versions": data["versions"],
        "backends": rows,
        "certificate": data["certificate"],
    }


def as_text(found: dict[str, Any]) -> str:
    """Put a description into words."""
    spec, source, batch = found["spec"], found["source"], found["batch"]
    states = ", ".join(map(str, spec["layers"]))
    weights = "RANDOM WEIGHTS: a rehearsal, its features mean nothing" if source["random_weights"] else "pretrained"
    lines = [
        f"{found['name']}: {spec['family']} tower from {source['checkpoint']}",
        f"  weights      {weights} (sha256 {source['weights_sha256'][:12]}…)",
        f"  reads        hidden state {states} of {spec['num_layers']} layers, {spec['select_feature']} tokens",
        f"  pixel_values {_shape(found['input'])}, batch {batch['min']} to {batch['max']}, best at {batch['opt']}",
        f"  features     {found['num_patches']} patches of {found['hidden_size']}",
        f"  on disk      {found['size'] / MB:.0f} MB, made by trtower {found['trtower']}",
        "  plans",
    ]
    for plan in found["plans"]:
        gpus = ", ".join(plan["compute_capabilities"]) or "any from 8.0 on that TensorRT-RTX supports"
        lines.append(f"    {plan['file']} ({plan['size'] / MB:.0f} MB) for compute capability {gpus}")
    if not found["plans"]:
        lines.append(f"    none: trtower build {found['path']}")
    lines.append("  here")
    for row in found["backends"]:
        lines.append(
            f"    {'runs' if row['runs'] else 'not '} {row['backend']:<17} {row['obstacle'] or 'on ' + row['device']}"
        )
    lines.append(f"  certificate  {_certificate(found['certificate'])}")
    return "\n".join(lines)


def certificate_in_words(certificate: Certificate) -> str:
    """Say in one line what a certificate proves, and what it does not."""
    return _certificate(dataclasses.asdict(certificate))


def _certificate(certificate: dict[str, Any] | None) -> str:
    if certificate is None:
        return "none: trtower check BUNDLE makes one"
    verdict = "passed" if certificate["passed"] else "FAILED"
    figures = certificate["bundle"]
    what = "the plan was run" if certificate["ran"] == "plan" else "the ONNX graph was run"
    text = (
        f"{verdict} on {certificate['date']}, {len(certificate['images'])} images: {what} on {certificate['backend']}; "
        f"token cosine {_number(figures['token_cosine_min'])} at least, "
        f"relative error {_number(figures['relative_error'])}"
    )
    if certificate["not_run"]:
        text += f"; built but NOT run: {', '.join(certificate['not_run'])}"
    return text


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _shape(tensor: dict[str, Any]) -> str:
    return f"({', '.join(map(str, tensor['shape']))}) {tensor['dtype']}"
