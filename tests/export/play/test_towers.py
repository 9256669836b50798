"""Both towers on one picture: their patches, their likeness, and what is clicked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CHOSEN_ON_A_CPU, IMAGE_SIZE, PATCH_SIZE, Bundles, make_model
from tests.pictures import picture
from tests.runtime.serving.conftest import Projected, projected  # noqa: F401 - a fixture
from trtower import CheckpointError, ConfigError, VisionTower
from trtower.bundle.bundle import Bundle
from trtower_export.checkpoint.checkpoint import open_checkpoint, reopen_checkpoint
from trtower_export.play.page import MARK, _panel, _width, describe_towers, patch_at
from trtower_export.play.towers import Towers

SIDE = IMAGE_SIZE // PATCH_SIZE


def open_(bundle: Path) -> Towers:
    opened = Bundle.open(bundle)
    return Towers.open(opened, reopen_checkpoint(opened.manifest.source), CHOSEN_ON_A_CPU)


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"pixels": "uint8", "layout": "nhwc"}], ids=str)
def test_both_see_the_same_patches(bundles: Bundles, options: dict[str, str]) -> None:
    towers = open_(bundles(**options))
    look = towers.look(picture(0))
    assert look.reference.shape == look.bundle.shape == (SIDE**2, towers.tower.hidden_size)
    assert look.cosines.min() > 0.999
    encoded = VisionTower.load(bundles(**options), CHOSEN_ON_A_CPU).encode(picture(0))[0].float()
    assert torch.equal(look.bundle, encoded)
    assert look.reference_s > 0
    assert look.bundle_s > 0


def test_what_is_seen_is_what_the_processor_leaves(bundles: Bundles) -> None:
    towers = open_(bundles())
    seen = towers.look(Image.new("RGB", (80, 60), (200, 100, 50))).seen
    assert seen.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert np.abs(np.asarray(seen, int) - (200, 100, 50)).max() <= 1


def test_patch_is_most_like_itself(bundles: Bundles) -> None:
    look = open_(bundles()).look(picture(1))
    for patch in range(SIDE**2):
        for similar in look.similar_to(patch):
            assert similar.argmax() == patch
            assert similar[patch] == pytest.approx(1)
    reference, bundle = look.similar_to(0)
    assert torch.allclose(reference, bundle, atol=1e-4)


def test_tokens_after_a_projector_are_shown(projected: Projected) -> None:  # noqa: F811
    towers = open_(projected("gemma3"))
    assert towers.look(picture(0)).bundle.shape[0] == towers.side**2


def test_embedding_has_nothing_to_show(bundles: Bundles) -> None:
    with pytest.raises(ConfigError, match=r"play shows a grid of patches, but .* returns the embedding"):
        open_(bundles("siglip", layer=None, head="embedding"))


def test_other_weights_are_refused(bundles: Bundles, tmp_path: Path) -> None:
    model = make_model("clip")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="are not the ones that"):
        Towers.open(Bundle.open(bundles()), open_checkpoint(str(tmp_path)), CHOSEN_ON_A_CPU)


def test_page_says_what_runs(bundles: Bundles) -> None:
    text = describe_towers(open_(bundles()))
    assert "hidden state 3 of 4 layers" in text
    assert "**openvino" in text


# Panels


@pytest.mark.parametrize("side", [3, 24, 37])
def test_click_finds_the_patch(side: int) -> None:
    cell = _width(side) // side
    for patch in (0, side - 1, side, side**2 - 1):
        row, column = divmod(patch, side)
        assert patch_at((column * cell, row * cell), side) == patch
        assert patch_at(((column + 1) * cell - 1, (row + 1) * cell - 1), side) == patch
    assert patch_at((_width(side) + 5, -5), side) == side - 1


def test_mark_frames_its_patch() -> None:
    pixels = np.asarray(_panel(np.zeros((9, 3), np.uint8), 3, mark=4))
    cell = _width(3) // 3
    assert tuple(pixels[cell, cell]) == MARK
    assert tuple(pixels[cell + cell // 2, cell + cell // 2]) == (0, 0, 0)
    assert tuple(pixels[cell - 1, cell]) == (0, 0, 0)
