"""Compare hidden states with PyTorch's in FP32: those that run_own.py left, and PyTorch's own in FP16.

python benchmarks/hopper/compare.py FOLDER OUT.json
"""

import json
import pathlib
import sys

import torch


def distance(made: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Return the relative error, the smallest cosine of a token, and whether all numbers are finite."""
    got, want = made.double().cpu(), reference.double().cpu()
    cosine = torch.nn.functional.cosine_similarity(got, want, dim=-1)
    relative = ((got - want).norm() / want.norm()).item()
    return {"relative": relative, "cosine_min": cosine.min().item(), "finite": bool(got.isfinite().all())}


def main() -> None:
    """Compare what is there."""
    folder, out = map(pathlib.Path, sys.argv[1:])
    answers = torch.load(folder / "answers.pt", weights_only=True)
    found = {"PyTorch in FP16": distance(answers["fp16_eager"], answers["fp32"])}
    for path in sorted(folder.glob("*.own.f16")):
        made = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float16)
        found[f"TensorRT 8.6.0, {path.name}"] = distance(made.view_as(answers["fp32"]), answers["fp32"])
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
