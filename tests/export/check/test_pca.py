import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from trtower.errors import InputError
from trtower_export.check.report import pca
from trtower_export.check.report.pca import PcaRow, draw_pca, draw_strips, pca_colours

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
    """Cut the three panels of a photograph out of the pca."""
    image = np.asarray(Image.open(path).convert("RGB"))
    size = SIDE * round(pca.PANEL / SIDE)
    left = pca.MARGIN + index % 3 * (3 * size + 2 * pca.GAP + pca.GUTTER)
    top = pca.TITLE + pca.HEADER + index // 3 * (size + pca.CAPTION)
    step = size + pca.GAP
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
    cell = round(pca.PANEL / SIDE)
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
    assert (long[:, -pca.MARGIN + 2 :] == 255).all()
    words = slice(len(short) - pca.CAPTION, None)
    inked = np.flatnonzero((short[words] < 255).any(axis=0))
    caption = inked[np.diff(inked).argmax() + 1] - pca.GAP  # it starts after the widest gap
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


def spoil(features: list[torch.Tensor], *patches: tuple[int, int]) -> list[torch.Tensor]:
    """Turn patches of the first photograph away, each by less than the one before."""
    changed = [f.clone() for f in features]
    for place, (row, column) in enumerate(patches):
        changed[0][SIDE * row + column] += (20.0 - 4 * place) * torch.randn(
            WIDTH, generator=torch.Generator().manual_seed(place)
        )
    return changed


def colour(name: str) -> tuple[int, ...]:
    return ImageColor.getrgb(name)


def strip_panels(png: bytes) -> list[np.ndarray]:
    """Cut the four panels out of a strip."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    size, step = image.shape[0], image.shape[0] + pca.STRIP_GAP
    assert size == SIDE * round(pca.STRIP_PANEL / SIDE)
    return [image[:, place * step : place * step + size] for place in range(4)]


def framed(panel: np.ndarray, shade: str) -> tuple[int, int, int, int]:
    """Give the top, left, bottom and right of what has this colour."""
    places = np.argwhere((panel == colour(shade)).all(axis=-1))
    (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
    return int(top), int(left), int(bottom), int(right)


def test_worst_patch_is_framed_where_it_lies(features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    changed = spoil(features, (3, 9))
    strips = draw_strips(rows(features, changed), limit=1e-3, mark=1)
    photograph, *others = strip_panels(strips[0])
    cell = len(photograph) // SIDE
    top, left, bottom, right = framed(photograph, pca.WORST)
    frame = len(photograph) // pca.PANEL_OF_ONE_PIXEL
    assert (top + frame, left + frame) == (3 * cell, 9 * cell)
    assert (bottom + 1 - frame, right + 1 - frame) == (4 * cell, 10 * cell)
    inside = photograph[3 * cell : 4 * cell, 9 * cell : 10 * cell]
    assert (inside == (200, 0, 0)).all(), "a frame lies around its patch, not on it"
    assert not any((panel == colour(pca.WORST)).all(axis=-1).any() for panel in others)
    assert (strip_panels(strips[1])[0] == (200, 0, 0)).all(), "an exact photograph has no worst patch"


def test_next_worst_patches_are_framed_in_another_colour_and_no_more_than_asked(features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    changed = spoil(features, (3, 9), (12, 2), (8, 13))
    two = strip_panels(draw_strips(rows(features, changed), limit=1e-3, mark=2)[0])[0]
    cell = len(two) // SIDE
    top, left, bottom, right = framed(two, pca.WORSE)
    assert (top // cell, left // cell) == (11, 1)
    assert (bottom // cell, right // cell) == (13, 3)


def test_frame_at_the_border_stays_whole(features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    for row, column in ((0, 0), (SIDE - 1, SIDE - 1), (0, SIDE - 1)):
        changed = spoil(features, (row, column))
        panel = strip_panels(draw_strips(rows(features, changed), limit=1e-3, mark=1)[0])[0]
        cell, frame = len(panel) // SIDE, len(panel) // pca.PANEL_OF_ONE_PIXEL
        top, left, bottom, right = framed(panel, pca.WORST)
        edge = (panel == colour(pca.EDGE)).all(axis=-1)
        assert min(bottom - top, right - left) >= cell
        assert all(edge[line].any() for line in (top - 1, bottom + 1))
        assert (panel[top : top + frame, left : right + 1] == colour(pca.WORST)).all()


def test_patch_that_is_not_finite_is_the_worst_and_pink_among_the_errors(features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    changed = spoil(features, (3, 9))
    changed[0][SIDE * 5 + 6, 2] = torch.nan
    panel, _, _, error = strip_panels(draw_strips(rows(features, changed), limit=1e-3, mark=1)[0])
    cell = len(panel) // SIDE
    top, left, _, _ = framed(panel, pca.WORST)
    assert ((top + cell // 2) // cell, (left + cell // 2) // cell) == (5, 6)
    assert framed(error, pca.WORST) == (5 * cell, 6 * cell, 6 * cell - 1, 7 * cell - 1)


def test_error_panel_is_white_at_the_limit_and_black_far_below(features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    changed = spoil(features, (3, 9))
    error = strip_panels(draw_strips(rows(features, changed), limit=1e-3)[0])[3]
    cell = len(error) // SIDE
    assert (error[3 * cell : 4 * cell, 9 * cell : 10 * cell] == 255).all()
    assert (error == 0).all(axis=-1).sum() == error[..., 0].size - cell**2


def test_demo_picture_frames_nothing_unless_asked(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    changed = spoil(features, (3, 9))
    draw_pca(rows(features, changed), tmp_path / "plain.png")
    draw_pca(rows(features, changed), tmp_path / "marked.png", mark=1)
    assert (panels(tmp_path / "plain.png", 0)[0] == (200, 0, 0)).all()
    cell = round(pca.PANEL / SIDE)
    top, left, _, _ = framed(panels(tmp_path / "marked.png", 0)[0], pca.WORST)
    assert (top + 1, left + 1) == (3 * cell, 9 * cell)


def test_name_with_dollars_is_written_as_it_is(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    row = rows(features[:1], features[:1])[0]
    draw_pca([replace(row, name=r"$\frac{$.png")], tmp_path / "pca.png")


@pytest.mark.parametrize(("patches", "width"), [(1, 24), (4, 1), (9, 2)])
def test_few_patches_and_narrow_features_are_drawn(patches: int, width: int) -> None:
    features = [torch.randn(patches, width, generator=torch.Generator().manual_seed(1))]
    assert len(draw_strips(rows(features, features), limit=1e-3)) == 1


def test_reference_that_is_not_finite_leaves_the_basis_alone(features: list[torch.Tensor]) -> None:
    broken = [f.clone() for f in features]
    broken[0][5] = torch.nan
    reference, _ = pca_colours(broken, features)
    whole, _ = pca_colours(features, features)
    assert reference[0][5].tolist() == [0, 0, 0]
    assert (reference[1].int() - whole[1].int()).abs().float().mean() < 3
    nothing, _ = pca_colours([torch.full((4, 3), torch.nan)], [torch.ones(4, 3)])
    assert nothing[0].tolist() == [[0, 0, 0]] * 4
