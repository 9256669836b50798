"""Compare openpi's π0 in PyTorch: eager, and with a bundle installed of its tower and projector.

Its code fixes the size of the tower and the width of the language model, which are of full size; depths are small.
"""

import importlib
import importlib.util
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from command_line import arguments, export
from comparing import Report
from safetensors.torch import save_file

args = arguments()

CODE = args.clone / "src" / "openpi" / "models_pytorch"
FOUND = importlib.util.find_spec("transformers")
assert FOUND is not None
assert FOUND.origin is not None
# As openpi's README says.
shutil.copytree(CODE / "transformers_replace", Path(FOUND.origin).parent, dirs_exist_ok=True)

import trtower  # noqa: E402

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
EXACT = 1e-5
"""Relative to the largest action, in FP32."""

HEADS: dict[str, list[str]] = {"none": [], "projector": ["--head", "projector"]}
WIDTHS = {"paligemma": 2048, "expert": 64}
TOKENS = 9


def load_model_file() -> Any:
    """Import openpi's model, without the files that import JAX: for sizes, and for a resizing that is not called."""
    for package in ("openpi", "openpi.models", "openpi.shared", "openpi.models_pytorch"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    sys.modules["openpi.models_pytorch"].__path__ = [str(CODE)]
    gemma, image_tools = types.ModuleType("openpi.models.gemma"), types.ModuleType("openpi.shared.image_tools")
    vars(gemma)["get_config"] = get_config
    for module in (gemma, image_tools):
        sys.modules[module.__name__] = module
        parent, _, name = module.__name__.rpartition(".")
        setattr(sys.modules[parent], name, module)
    return importlib.import_module("openpi.models_pytorch.pi0_pytorch")


def get_config(variant: str) -> Any:
    """Return what openpi's function of this name does, with two layers."""
    return SimpleNamespace(
        width=WIDTHS[variant], depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16, lora_configs={}
    )


def make_policy(dtype: str) -> Any:
    """Make a π0 with random weights, in openpi's precision ``dtype``."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        pi05=False,
        paligemma_variant="paligemma",
        action_expert_variant="expert",
        dtype=dtype,
        action_dim=7,
        action_horizon=5,
        pytorch_compile_mode=None,
    )
    return load_model_file().PI0Pytorch(config).eval()


def write_checkpoint(folder: Path, policy: Any) -> Path:
    """Save a policy as openpi does, without its words: two gigabytes that no tower reads."""
    folder.mkdir()
    written = {"action_dim": 7, "action_horizon": 5, "paligemma_variant": "gemma_2b", "precision": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written))
    words = ("embed_tokens", "lm_head")
    tensors = {name: each for name, each in policy.state_dict().items() if not any(word in name for word in words)}
    save_file({name: each.clone() for name, each in tensors.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def observe(policy: Any, shown: tuple[bool, ...] = (True, True, True)) -> dict[str, torch.Tensor]:
    """Act on images that are always the same, from the same noise."""
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.rand(1, 3, 224, 224, generator=generator) * 2 - 1 for name in CAMERAS}
    seen = dict(zip(CAMERAS, shown, strict=True))
    observation = SimpleNamespace(
        images={name: each if seen[name] else -torch.ones_like(each) for name, each in images.items()},
        image_masks={name: torch.tensor([seen[name]]) for name in CAMERAS},
        state=torch.rand(1, 7, generator=generator),
        tokenized_prompt=torch.randint(5, 1000, (1, TOKENS), generator=generator),
        tokenized_prompt_mask=torch.ones(1, TOKENS, dtype=torch.bool),
        token_ar_mask=None,
        token_loss_mask=None,
    )
    noise = torch.randn(1, 5, 7, generator=generator)
    return {"actions": policy.sample_actions("cpu", observation, noise=noise, num_steps=2)}


def main() -> None:
    report = Report("openpi", args.clone)
    report.tolerances |= {"actions": EXACT}
    report.note_stubs(["openpi.models.gemma.get_config (two layers)", "openpi.shared.image_tools (not called)"])
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        policy = make_policy("float32")
        folder = write_checkpoint(work / "pi0", policy)
        masked = (True, False, True)
        for head, options in HEADS.items():
            with report.attempt(f"--head {head}"):
                bundle = export(args.trtower, folder, work / head, *options)
                observed, hidden, calls = observe(policy), observe(policy, masked), list[int]()
                with trtower.install(policy, bundle) as installation:
                    installation.tower.on_batch = lambda batch, calls=calls: calls.append(batch.batch)
                    report.compare(f"--head {head}, installed", observed, observe(policy))
                    report.compare(f"--head {head}, one camera missing", hidden, observe(policy, masked))
                report.check(f"--head {head}, images of each engine call", calls, [3, 2])
                report.compare(f"--head {head}, uninstalled", observed, observe(policy), exact=True)
        check_half(report, folder, work)
    report.finish()


def check_half(report: Report, folder: Path, work: Path) -> None:
    """Compare an FP16 bundle in openpi's own precision, BF16 with embeddings in FP32, with openpi in FP32."""
    in_half = make_policy("bfloat16")
    with report.attempt("bfloat16"):
        exact, own = (observe(each)["actions"] for each in (make_policy("float32"), in_half))
        bundle = export(args.trtower, folder, work / "half", *HEADS["projector"], precision="fp16")
        with trtower.install(in_half, bundle):
            served = observe(in_half)["actions"]
        off, eager = (float((each - exact).norm() / exact.norm()) for each in (served, own))
        title = f"bfloat16, actions with an FP16 bundle off by {off:.2g}, with the eager tower by {eager:.2g}"
        report.check(title, off <= 2 * eager, expected=True)
        report.compare("bfloat16, uninstalled", {"actions": own}, observe(in_half), exact=True)


main()
