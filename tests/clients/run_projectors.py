"""Compare every projector of the original LLaVA, LLaVA-NeXT and VILA with the one in trtower, bit for bit.

    python tests/clients/run_projectors.py LLAVA NEXT VILA

Each argument is a clone. Only the files that define projectors are loaded, so trtower's own environment is enough.
"""

import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trtower_export.heads.mm_projector import DOWNSAMPLING, HEADS

WIDTH, TEXT = 36, 24
GRIDS = (16, 25, 36, 49, 64, 81)
"""Patches of a tile: even, odd, and multiples of three."""

BUILDER = "llava/model/multimodal_projector/builder.py"
PLAIN = ("linear", "identity", "mlp2x_gelu", "mlp3x_gelu")


def main() -> int:
    """Compare all, print each, and return 1 if one differs."""
    llava, next_, vila = (Path(argument) for argument in sys.argv[1:4])
    wrong = 0
    for name, clone, kinds in (("LLaVA", llava, PLAIN), ("LLaVA-NeXT", next_, (*PLAIN, "mlp2x_res3x_gelu"))):
        build = load(clone / BUILDER, pooler_projector={"PoolerProjector": None}).build_vision_projector
        wrong += sum(differs(f"{name} {kind}", config(kind), build(config(kind))) for kind in kinds)
    module = load(vila / "llava/model/multimodal_projector/base_projector.py")
    for kind in (*PLAIN, *DOWNSAMPLING):
        settings = config(kind, mm_projector_cfg={"mm_projector_type": kind})
        theirs = module.MultimodalProjector(module.MultimodalProjectorConfig(kind), settings)
        wrong += differs(f"VILA {kind}", settings, theirs)
    return int(wrong > 0)


def config(kind: str, **others: Any) -> Any:
    """Make what the code reads of a model's config."""
    text = WIDTH if kind == "identity" else TEXT
    return SimpleNamespace(mm_projector_type=kind, mm_hidden_size=WIDTH, hidden_size=text, **others)


def load(path: Path, **siblings: dict[str, Any]) -> Any:
    """Load one file of a clone; ``siblings`` replace modules beside it, and timm is not needed."""
    package = types.ModuleType("clone")
    package.__path__ = [str(path.parent)]
    sys.modules |= {"clone": package, "timm.models.layers": SimpleNamespace(Mlp=None)}  # type: ignore[dict-item]
    for name, members in siblings.items():
        sys.modules[f"clone.{name}"] = SimpleNamespace(**members)  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location(f"clone.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def differs(what: str, settings: Any, theirs: nn.Module) -> bool:
    """Give ours the weights of theirs, and compare what both make of every grid."""
    (head,) = HEADS
    assert head.own is not None
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = head.own(settings).eval().requires_grad_(requires_grad=False)
    ours.load_state_dict(theirs.state_dict())
    theirs.eval().requires_grad_(requires_grad=False)
    tokens = [torch.randn(2, count, WIDTH) for count in GRIDS]
    same = all(torch.equal(ours(each), theirs(each)) for each in tokens)
    verdict = "equal bit for bit" if same else "DIFFERENT"
    sys.stdout.write(f"{what}: {verdict} on grids of {', '.join(map(str, GRIDS))} patches\n")
    return not same


if __name__ == "__main__":
    sys.exit(main())
