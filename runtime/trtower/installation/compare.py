"""Have a bundle and the tower whose place it is to take see one image, before anything is changed.

It tells what neither config nor weights do: a forward pass that was patched, a hook that changes a state, weights that
were put elsewhere, another implementation under the same name.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trtower.errors import ConfigError
from trtower.fingerprint import count_layers
from trtower.installation.find import TowerSlot
from trtower.layer_codes import name_layer
from trtower.spec import EIGHT_BIT
from trtower.tower.outputs import served_layers
from trtower.tower.vision_tower import VisionTower

logger = logging.getLogger(__name__)

STATES = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
"""What vision models give, of which a bundle has the states, and models make do without the rest."""

SAME_TOWER = 0.1
"""Relative error of a state's median channel, below which two towers compute the same. The demo's pretrained ViT-S is
off by 0.002 in FP16, by 0.016 in BF16, with QuickGELU for GELU by 0.15, with two layers swapped by 0.45, and its next
state by 0.6. The median, because one channel of real towers is a hundred times the others."""

SAME_TOWER_8_BIT = 0.3
"""FP8 and INT8 are off by 0.08 (see benchmarks/README.md), and by more where images are unlike the calibration's."""


@torch.no_grad()
def check_answers(place: TowerSlot, ran: VisionTower, *, compared: bool) -> None:
    """Have both towers see one image, and raise ConfigError where they do not see the same, if they are ``compared``.

    ``ran`` gives every token of every layer that its bundle holds.
    """
    spec, module = ran.spec, place.module
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(ran.bundle.manifest.batch.min, 3, *[spec.image_size] * 2, generator=generator, device="cpu")
    pixel_values = drawn.to(next(module.parameters()).device, module.dtype)
    with _asked_for_states(module.config):
        output = module.forward(pixel_values)  # and no hook hears of it
    others = sorted(output.keys() - STATES)
    if others:
        raise ConfigError(f"{place.path} of this model gives {', '.join(others)}; a bundle gives hidden states alone.")
    if not compared:
        return
    if getattr(output, "hidden_states", None) is None:
        raise ConfigError(f"{place.path} of this model gives no hidden states when its config asks for them.")
    depth = count_layers(module, spec.naming)
    states = (*output.hidden_states[: depth + 1], output.last_hidden_state)
    tokens = ran(pixel_values)
    for layer, held in served_layers(spec, depth).items():
        (columns,) = spec.columns([held])
        found, expected = tokens[..., columns].float(), states[layer].float()
        if not expected.isfinite().all():
            logger.warning("%s of this model is not finite in %s: it is not compared.", place.path, module.dtype)
            return
        error = _error(found, expected)
        limit = SAME_TOWER_8_BIT if ran.bundle.manifest.precision in EIGHT_BIT else SAME_TOWER
        if not error <= limit:  # nor is NaN
            state = f"hidden state {name_layer(layer, depth)}"
            if not math.isfinite(error):
                raise ConfigError(
                    f"{ran.bundle.path} gives NaN or infinity in {state}, and {place.path} of this model does not: "
                    f"trtower check {ran.bundle.path} says how far it is to be trusted."
                )
            raise ConfigError(
                f"{place.path} of this model and {ran.bundle.path} see one image differently: {state} is off by "
                f"{error:.0%}. Was the model's code changed, or its weights put elsewhere?"
            )


def _error(found: Tensor, expected: Tensor) -> float:
    """Give ‖x - ref‖ / ‖ref‖ of the median channel, over all tokens: (B, P + N, D) each."""
    off, size = (each.flatten(0, 1).norm(dim=0) for each in (found - expected, expected))
    return float((off / size.clamp_min(torch.finfo(torch.float32).tiny)).median())


@contextmanager
def _asked_for_states(config: Any) -> Iterator[None]:
    """Have a tower give every state: InternVL's of transformers 4.57 can be asked by its config alone."""
    before = {name: getattr(config, name, None) for name in ("output_hidden_states", "return_dict")}
    for name in before:
        setattr(config, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
