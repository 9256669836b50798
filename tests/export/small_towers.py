"""The towers of conftest, cut after the final norm and split into operations. Each is made only once."""

from functools import cache

import torch
import transformers
from torch import Tensor

from tests.conftest import IMAGE_SIZE, make_model
from trtower.layer_codes import LAST
from trtower.spec import TowerSpec
from trtower_export.families import family_of
from trtower_export.graph.operations import Operations
from trtower_export.graph.truncate import TruncatedTower, truncate
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
"""Names of the parts of a DINOv2 layer: in transformers 5.x -> in 4.57."""

IS_OLD = int(transformers.__version__.partition(".")[0]) < 5


def dinov2(name: str) -> str:
    """Return the name of a DINOv2 operation in the installed transformers."""
    head, dot, part = name.partition(".attention.") if ".attention." in name else name.partition(".mlp.")
    part = f"{dot.strip('.')}.{part}"
    return f"{head}.{OLD_DINOV2[part]}" if IS_OLD and part in OLD_DINOV2 else name


@cache
def cut(name: str) -> tuple[TruncatedTower, TowerSpec]:
    model = make_model(name)
    family = family_of(model.config.model_type)
    spec = family.spec(model.config, LAST, "patch")
    return truncate(model, family, spec), spec


@cache
def simulation(name: str) -> Simulation:
    """Return the simulation of a tower, with its attention split into operations."""
    return simulate(*cut(name))


def operations(name: str) -> Operations:
    return simulation(name).operations


@cache
def pixels(batch: int = 2, dtype: torch.dtype = torch.float16) -> Tensor:
    """Draw FP32 pixels (B, 3, S, S) that ``dtype`` can hold exactly."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype).float()


@cache
@torch.no_grad()
def exact(name: str, batch: int = 2, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return what the tower itself computes from `pixels` in FP32."""
    tower, _ = cut(name)
    features: Tensor = tower(pixels(batch, dtype))
    return features


def relative_error(features: Tensor, reference: Tensor) -> float:
    return float((features.float() - reference).norm() / reference.norm())
