import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trtower.errors import InputError
from trtower_export.demo import picture
from trtower_export.demo.picture import PcaRow, draw_pca, pca_colours

SIDE, WIDTH = 16, 24


@pytest.fixture
def features() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -1, WIDTH)
    return [torch.randn(SIDE * SIDE, WIDTH, generator=generator) * spread + 3 for _ in range(4)]


def rows(reference: list[torch.Tensor], bundle: list[torch.Tensor]) -> list[PcaRow]:
    red = Image.new("RGB", (50, 50), (200, 0, 0))
    return [
        PcaRow(f"photograph {index}", red, left, right, "cosine mean 1.000000  min 0.999999")
        for index, (left, right) in enumerate(zip(reference, bundle, strict=True))
    ]


def panels(path: Path, index: int) -> list[np.ndarray]:
    """Cut the three panels of a photograph out of the picture."""
    image = np.asarray(Image.open(path).convert("RGB"))
    size = SIDE * round(picture.PANEL / SIDE)
    left = picture.MARGIN + index % 3 * (3 * size + 2 * picture.GAP + picture.GUTTER)
    top = picture.TITLE + picture.HEADER + index // 3 * (size + picture.CAPTION)
    step = size + picture.GAP
    return [image[top : top + size, left + place * step : left + place * step + size] for place in range(3)]


def test_equal_features_have_equal_panels_and_a_changed_patch_shows(
    tmp_path: Path, features: list[torch.Tensor]
) -> None:
    pytest.importorskip("matplotlib")
    changed = [f.clone() for f in features]
    changed[3][SIDE + 2] = changed[3][SIDE + 2].neg() + 20  # second line of patches, third place
    draw_pca(rows(features, changed), tmp_path / "pca.png")
    photograph, left, right = panels(tmp_path / "pca.png", 0)
    assert (photograph == (200, 0, 0)).all()
    assert np.array_equal(left, right)
    assert left.std() > 20
    _, left, right = panels(tmp_path / "pca.png", 3)
    cell = round(picture.PANEL / SIDE)
    different = np.argwhere((left != right).any(axis=-1)) // cell
    assert {tuple(place) for place in different.tolist()} == {(1, 2)}


def test_picture_is_the_same_file_each_time(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        draw_pca(rows(features, features), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_drawing_leaves_pyplot_out(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    loaded = "matplotlib.pyplot" in sys.modules
    draw_pca(rows(features, features), tmp_path / "pca.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_long_names_are_cut_before_the_caption(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    row = rows(features[:1], features[:1])[0]
    draw_pca([replace(row, name="W")], tmp_path / "short.png")
    draw_pca([replace(row, name="W" * 200)], tmp_path / "long.png", title="M" * 200, bundle_label="W" * 200)
    short, long = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("short", "long"))
    assert (long[:, -picture.MARGIN + 2 :] == 255).all()
    words = slice(len(short) - picture.CAPTION, None)
    inked = np.flatnonzero((short[words] < 255).any(axis=0))
    caption = inked[np.diff(inked).argmax() + 1] - picture.GAP  # it starts after the widest gap
    assert np.array_equal(short[words, caption:], long[words, caption:])
    assert (long[words, :caption] < 255).sum() > 5 * (short[words, :caption] < 255).sum()


def test_bundle_is_coloured_on_the_basis_of_the_reference(features: list[torch.Tensor]) -> None:
    shifted = [f + 4 * torch.eye(WIDTH)[0] for f in features]
    reference, bundle = pca_colours(features, shifted)
    own, _ = pca_colours(shifted, shifted)
    assert torch.equal(own[0], reference[0])
    assert (bundle[0][:, 0].int() - reference[0][:, 0].int()).float().mean() > 10


def test_colours_do_not_depend_on_the_order_of_photographs(features: list[torch.Tensor]) -> None:
    forward, _ = pca_colours(features, features)
    backward, _ = pca_colours(features[::-1], features[::-1])
    for left, right in zip(forward, backward[::-1], strict=True):
        assert (left.int() - right.int()).abs().max() <= 1


def test_axes_are_the_directions_of_largest_variance_pointing_up() -> None:
    line = torch.linspace(-1, 1, SIDE * SIDE)
    features = torch.zeros(SIDE * SIDE, 5)
    features[:, 4] = 9 * line
    features[:, 2] = 3 * (line * 50).sin()
    features[:, 0] = (line * 31).cos()
    red, green, blue = pca_colours([features], [features])[0][0].double().unbind(dim=1)
    for channel, source in ((red, 4), (green, 2), (blue, 0)):
        assert torch.corrcoef(torch.stack([channel, features[:, source].double()]))[0, 1] > 0.97


def test_what_is_not_finite_is_drawn_black(features: list[torch.Tensor]) -> None:
    broken = [f.clone() for f in features]
    broken[0][5] = torch.nan
    broken[0][6, 3] = torch.inf
    _, bundle = pca_colours(features, broken)
    assert bundle[0][5:7].tolist() == [[0, 0, 0]] * 2


def test_features_that_are_no_square_of_patches_are_refused(tmp_path: Path, features: list[torch.Tensor]) -> None:
    with pytest.raises(InputError, match="no photograph"):
        draw_pca([], tmp_path / "pca.png")
    with_prefix = [torch.cat([f[:1], f]) for f in features]
    with pytest.raises(InputError, match=r"shape \(257, 24\).*drop the prefix tokens"):
        draw_pca(rows(with_prefix, with_prefix), tmp_path / "pca.png")
    with pytest.raises(InputError, match=r"bundle features of photograph 0 have shape \(257, 24\).*\(256, 24\)"):
        draw_pca(rows(features, with_prefix), tmp_path / "pca.png")
