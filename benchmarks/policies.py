"""Time a step of a robot policy with its eager tower, and with a bundle in its place, in turn in one run.

    make policies

π0 and SmolVLA of LeRobot, with towers of full size, the rest small, and random weights: what is left beside the tower
is next to nothing, so the ratio is that of towers and not of whole policies. The eager policy is in FP32, as LeRobot
keeps π0's tower; the bundle is in FP16 with projector, on the backend that `auto` takes. This is not a test: the times
depend on the machine.
"""

import copy
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tests.policies.small import CAMERAS, WIDTH, act, make_policy, observe

import trtower
from trtower_export import ExportOptions, export_tower
from trtower_export.policies import openpi
from trtower_export.recipes import read_recipe

ROUNDS = 5
RECIPES = {"pi0": "pi0_base", "smolvla": "smolvla_base"}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
CASES = {"one camera": (1, 1), "three cameras": (3, 3), "one of three cameras, two missing": (3, 1)}
"""How many cameras the policy's config names, and how many there are."""


def main() -> None:
    """Measure each policy and print it."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}")
    for kind, name in RECIPES.items():
        with tempfile.TemporaryDirectory() as temporary:
            race(kind, name, Path(temporary))


def race(kind: str, name: str, folder: Path) -> None:
    """Time one policy, eager and compiled, with one camera and with three."""
    recipe = read_recipe(name)
    eager = make_policy(kind, folder, CAMERAS, {size: recipe.config[size] for size in SIZES})
    eager.save_pretrained(folder / "policy")
    narrow = replace(recipe, model=recipe.model | {"text_config": {"hidden_size": WIDTH}})
    options = ExportOptions(head="projector", flavour="none", check=False)
    with patch.object(openpi, "read_recipe", lambda _: narrow):
        export_tower(str(folder / "policy"), folder / "bundle", options)
    compiled = copy.deepcopy(eager)
    installation = trtower.install(compiled, folder / "bundle")
    print(f"{kind}, on {installation.tower.backend}")
    features = dict(eager.config.input_features)
    for case, (named, present) in CASES.items():
        kept = CAMERAS[:named]
        for policy in (eager, compiled):
            policy.config.input_features = {
                key: value for key, value in features.items() if "images" not in key or key.rpartition(".")[2] in kept
            }
        report(case, kind, eager, compiled, observe(CAMERAS[:present]))


def report(case: str, kind: str, eager: Any, compiled: Any, batch: dict[str, Any]) -> None:
    """Time both policies on one observation, in turn, and print the ratio and how far their actions are apart."""
    expected, actual = act(kind, eager, batch), act(kind, compiled, batch)  # and the first run of each
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(ROUNDS):
        for name, policy in (("eager", eager), ("compiled", compiled)):
            start = time.perf_counter()
            act(kind, policy, batch)
            seconds[name].append(time.perf_counter() - start)
    before, after = (statistics.median(each) for each in seconds.values())
    off = float((actual - expected).norm() / expected.norm())
    print(
        f"  {case}: {before:.2f} s eager, {after:.2f} s with the bundle: {before / after:.2f} times as fast; actions "
        f"differ by {off:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
