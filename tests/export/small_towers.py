"""The towers of conftest, cut behind the final norm and taken apart into operations; each is made once."""

from functools import cache

import torch
from torch import Tensor, nn

from tests.conftest import IMAGE_SIZE, make_model
from trtower.layer_codes import LAST
from trtower.spec import TowerSpec
from trtower_export.doctor import simulate
from trtower_export.families import family_of
from trtower_export.operations import Operations
from trtower_export.rounding import Simulation
from trtower_export.truncate import truncate


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
