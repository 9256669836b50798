"""The command line of all client scripts, and how they call the trtower command."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def arguments(**others: str) -> argparse.Namespace:
    """Parse the command line and put the clones on the path. ``others`` are more clones and their help."""
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", type=Path, help="a clone of the client's repository")
    for name, description in others.items():
        parser.add_argument(name, type=Path, help=description)
    parser.add_argument("--trtower", default="trtower", help="the trtower command of the environment that exports")
    parser.add_argument(
        "--work", type=Path, help="where to keep checkpoints and bundles; by default a temporary folder"
    )
    args = parser.parse_args()
    for clone in (args.clone, *(getattr(args, name) for name in others)):
        sys.path.insert(0, str(clone.resolve()))
    torch.manual_seed(0)
    return args


def export(trtower: str, checkpoint: Path, bundle: Path, *options: str, precision: str = "fp32") -> Path:
    """Export a checkpoint's tower, in the command's environment, because the client's has no exporter."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("runtime", "export"))
    command: list[str | Path] = [
        trtower,
        "export",
        checkpoint,
        "--out",
        bundle,
        "--precision",
        precision,
        "--flavour",
        "none",
        *options,
    ]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return bundle
