"""Compare the outputs of a bundle and the tower that it will replace, on one image, before anything is changed.

This finds what neither config nor weights reveal: a patched forward pass, a hook that changes a state, swapped weights,
another implementation under the same name.
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
from trtower.installation.find import Slot
from trtower.installation.prismatic import SECOND_LAST, is_prismatic
from trtower.layer_codes import name_layer
from trtower.spec import EIGHT_BIT
from trtower.tower.outputs import served_layers
from trtower.tower.vision_tower import VisionTower

logger = logging.getLogger(__name__)

STATES = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
"""What vision models return. A bundle provides the states; models can do without the rest."""

SAME_TOWER = 0.1
"""Two towers count as the same up to this relative error in a state's median channel. The demo's pretrained ViT-S is
off by 0.002 in FP16, 0.016 in BF16, 0.15 with QuickGELU for GELU, 0.45 with two layers swapped, 0.6 in its next state.
The median, because in real towers one channel is a hundred times larger than the others."""

SAME_TOWER_8_BIT = 0.3
"""FP8 and INT8 are off by 0.08 (see benchmarks/README.md), and by more on images unlike those of the calibration."""


@torch.no_grad()
def check_answers(place: Slot, compiled: VisionTower, *, compared: bool) -> None:
    """Raise ConfigError if the tower returns what no bundle can, or if ``compared`` and the two differ on an image.

    ``compiled`` returns every token of every layer that its bundle holds.
    """
    spec, vision = compiled.spec, place.vision
    generator = torch.Generator().manual_seed(0)
    batch = compiled.bundle.manifest.batch.min
    drawn = torch.randn(batch, 3, *[spec.image_size] * 2, generator=generator, device="cpu")
    pixel_values = drawn.to(next(place.module.parameters()).device, vision.dtype)
    depth = count_layers(vision, spec.naming)
    if is_prismatic(place.module):
        patches = place.module.forward(place.for_tower(pixel_values))[:, : spec.num_patches]  # of the first picture
        states = {depth + 1 + SECOND_LAST: patches}
    else:
        states = _read_states(place, pixel_values, depth, compared=compared)
    if not compared:
        return
    tokens = compiled(pixel_values)
    for layer, held in served_layers(spec, depth).items():
        if is_prismatic(place.module) and layer not in states:  # it returns one, without the tokens before its patches
            continue
        (columns,) = spec.columns([held])
        expected = states[layer].float()
        actual = tokens[:, tokens.shape[1] - expected.shape[1] :, columns].float()
        if not expected.isfinite().all():
            logger.warning(
                "%s of this model returns NaN or infinity in %s, so it was not compared with the bundle.",
                place.path,
                vision.dtype,
            )
            return
        towers = [*spec.towers] or [expected.shape[-1]]
        errors = [*map(relative_error, actual.split(towers, dim=-1), expected.split(towers, dim=-1))]
        error = next((each for each in errors if not math.isfinite(each)), max(errors))
        limit = SAME_TOWER_8_BIT if compiled.bundle.manifest.precision in EIGHT_BIT else SAME_TOWER
        if not error <= limit:  # catches NaN too
            state = f"hidden state {name_layer(layer, depth)}"
            if not math.isfinite(error):
                raise ConfigError(
                    f"{compiled.bundle.path} returns NaN or infinity in {state}, but {place.path} of this model does "
                    f"not. Measure the bundle's accuracy: trtower check {compiled.bundle.path}"
                )
            raise ConfigError(
                f"{place.path} of this model and {compiled.bundle.path} differ on the same image: {state} is off by "
                f"{error:.0%}, expected at most {limit:.0%}. Was the model's code changed, or were its weights swapped?"
                " If the difference is intended, allow_other_weights=True skips this comparison."
            )


def _read_states(place: Slot, pixel_values: Tensor, depth: int, *, compared: bool) -> dict[int, Tensor]:
    """Run a vision model of transformers; return its hidden states by their indices, or {} if nothing is compared."""
    module = place.module
    with _all_states_on(module.config):
        output = module.forward(pixel_values)  # does not call hooks
    others = sorted(output.keys() - STATES)
    if others:
        raise ConfigError(
            f"{place.path} of this model returns {', '.join(others)}; a bundle returns only hidden states."
        )
    if not compared:
        return {}
    if getattr(output, "hidden_states", None) is None:
        raise ConfigError(
            f"{place.path} of this model returns no hidden states, although its config was set to return them. "
            "allow_other_weights=True skips this comparison."
        )
    return dict(enumerate((*output.hidden_states[: depth + 1], output.last_hidden_state)))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖x - ref‖ / ‖ref‖ of the median channel over all tokens; both are (B, P + N, D)."""
    off, size = (each.flatten(0, 1).norm(dim=0) for each in (actual - expected, expected))
    return float((off / size.clamp_min(torch.finfo(torch.float32).tiny)).median())


@contextmanager
def _all_states_on(config: Any) -> Iterator[None]:
    """Make a tower return every state, by its config: InternVL's in transformers 4.57 has no other way."""
    before = {name: getattr(config, name, None) for name in ("output_hidden_states", "return_dict")}
    for name in before:
        setattr(config, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
