"""The towers of conftest, cut behind the final norm and taken apart into operations; each is made once."""

from functools import cache

import torch
import transformers
from torch import Tensor, nn

from tests.conftest import IMAGE_SIZE, make_model
from trtower.layer_codes import LAST
from trtower.spec import TowerSpec
from trtower_export.families import family_of
from trtower_export.graph.operations import Operations
from trtower_export.graph.truncate import truncate
from trtower_export.precision.doctor import simulate
from trtower_export.precision.rounding import Simulation

OLD_DINOV2 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.scores": "attention.attention.scores",
    "attention.context": "attention.attention.context",
    "attention.o_proj": "attention.output.dense",
    "mlp.activation_fn": "mlp.activation",
}
"""What transformers 4.57 calls the parts of a DINOv2 layer, by their names in 5.x."""

IS_OLD = int(transformers.__version__.partition(".")[0]) < 5


def dinov2(name: str) -> str:
    """Give an operation of a DINOv2 tower the name that it has in the installed transformers."""
    head, dot, part = name.partition(".attention.") if ".attention." in name else name.partition(".mlp.")
    part = f"{dot.strip('.')}.{part}"
    return f"{head}.{OLD_DINOV2[part]}" if IS_OLD and part in OLD_DINOV2 else name


@cache
def cut(name: str) -> tuple[nn.Module, TowerSpec]:
    model = make_model(name)
    family = family_of(model.config.model_type)
    spec = family.spec(model.config, LAST, "patch")
    return truncate(model, family, spec), spec


@cache
def simulation(name: str) -> Simulation:
    """Give the simulation of a tower, attention spelled out."""
    return simulate(*cut(name))


def operations(name: str) -> Operations:
    return simulation(name).operations


@cache
def pixels(batch: int = 2, dtype: torch.dtype = torch.float16) -> Tensor:
    """Draw pixels (B, 3, S, S), in FP32, that ``dtype`` holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype).float()


@cache
@torch.no_grad()
def exact(name: str, batch: int = 2, dtype: torch.dtype = torch.float16) -> Tensor:
    """Give what the tower itself makes of `pixels` in FP32."""
    tower, _ = cut(name)
    features: Tensor = tower(pixels(batch, dtype))
    return features


def relative_error(found: Tensor, reference: Tensor) -> float:
    return float((found.float() - reference).norm() / reference.norm())
