import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from trtower_export.check.report import pca
from trtower_export.check.report.pca import PcaRow, draw_sheet, draw_strips, pca_colours, strip_png
from trtower_export.drawing import to_png

SIDE, WIDTH = 16, 24
PANEL = 368
RUNNER = "onnxruntime 1.32.0, CPU"


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


def cut(strip: np.ndarray, count: int) -> list[np.ndarray]:
    """Cut a strip into its panels."""
    size, width = strip.shape[:2]
    gap = round(size * pca.GAP)
    assert width == count * size + (count - 1) * gap
    return [strip[:, place * (size + gap) : place * (size + gap) + size] for place in range(count)]


def strips(reference: list[torch.Tensor], bundle: list[torch.Tensor], mark: int = 0) -> list[list[np.ndarray]]:
    """Draw the four panels of every photograph."""
    return [cut(strip, 4) for strip in draw_strips(rows(reference, bundle), panel=PANEL, mark=mark, limit=1e-3)]


class Sheet:
    """A sheet as drawn: its pixels, and the boxes of its texts."""

    def __init__(self, drawn: list[PcaRow], path: Path) -> None:
        figures: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pca, "to_png", lambda figure: figures.append(figure) or to_png(figure))
            draw_sheet(drawn, path, runner=RUNNER)
        self.pixels = np.asarray(Image.open(path).convert("RGB"))
        self.boxes: dict[str, list[tuple[float, float, float, float]]] = {}
        for text in figures[0].texts:
            box = text.get_window_extent()
            top, bottom = (len(self.pixels) - y for y in (box.y1, box.y0))
            self.boxes.setdefault(text.get_text(), []).append((box.x0, top, box.x1, bottom))

    def places(self, strip: np.ndarray) -> list[tuple[int, int]]:
        """Find a strip on the sheet: every top and left at which all of its pixels match."""
        height, width = strip.shape[:2]
        corner = (self.pixels[: 1 - height, : 1 - width] == strip[0, 0]).all(axis=-1)
        return [
            (int(top), int(left))
            for top, left in np.argwhere(corner)
            if np.array_equal(self.pixels[top : top + height, left : left + width], strip)
        ]


def test_sheet_has_the_strip_of_each_photograph_between_headings_and_name(
    tmp_path: Path, features: list[torch.Tensor]
) -> None:
    pytest.importorskip("matplotlib")
    changed = [f.clone() for f in features]
    changed[3][SIDE + 2] = changed[3][SIDE + 2].neg() + 20
    drawn = [replace(row, caption=f"caption {index}") for index, row in enumerate(rows(features, changed))]
    sheet = Sheet(drawn, tmp_path / "pca.png")
    expected = draw_strips(drawn, panel=pca.PANEL)
    height, width, _ = expected[0].shape
    assert len({strip.tobytes() for strip in expected}) == 4
    for index, (row, strip) in enumerate(zip(drawn, expected, strict=True)):
        (place,) = sheet.places(strip)
        (name,), (caption,) = sheet.boxes[row.name], sheet.boxes[row.caption]
        top, left = place
        assert name[0] == pytest.approx(left, abs=2)
        assert caption[2] == pytest.approx(left + width, abs=2)
        assert all(top + height < box[1] < box[3] < top + height + pca.CAPTION for box in (name, caption))
        if index < 3:
            for panel, head in enumerate(("photograph", "PyTorch FP32", "bundle")):
                box = sheet.boxes[head][index]
                assert box[0] == pytest.approx(left + panel * (width - height) / 2, abs=2)
                assert box[3] < top
    assert len(sheet.boxes["bundle"]) == 3
    boxes = np.array([box for same in sheet.boxes.values() for box in same])
    assert (boxes[:, :2] > 0).all()
    assert (boxes[:, 2:] < sheet.pixels.shape[1::-1]).all()
    assert sheet.boxes.keys() >= {"Patch features on one PCA basis", f"bundle: {RUNNER}"}


def test_equal_features_have_equal_panels_and_a_changed_patch_shows(features: list[torch.Tensor]) -> None:
    changed = [f.clone() for f in features]
    changed[3][SIDE + 2] = changed[3][SIDE + 2].neg() + 20  # second row of patches, third column
    drawn = [cut(strip, 3) for strip in draw_strips(rows(features, changed), panel=pca.PANEL)]
    photograph, left, right = drawn[0]
    assert (photograph == (200, 0, 0)).all()
    assert np.array_equal(left, right)
    assert left.std() > 20
    _, left, right = drawn[3]
    different = np.argwhere((left != right).any(axis=-1)) // (len(left) // SIDE)
    assert {tuple(place) for place in different.tolist()} == {(1, 2)}


def test_every_patch_is_as_large_as_any_other() -> None:
    features = [torch.randn(37 * 37, WIDTH, generator=torch.Generator().manual_seed(0))]
    _, colours, _ = cut(draw_strips(rows(features, features), panel=pca.PANEL)[0], 3)
    assert len(colours) == 37 * 5
    blocks = colours.reshape(37, 5, 37, 5, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_picture_is_the_same_file_each_time(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        draw_sheet(rows(features, features), tmp_path / name, runner=RUNNER)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    one, other = (strip_png(draw_strips(rows(features, features), panel=PANEL)[0]) for _ in range(2))
    assert one == other


def test_drawing_does_not_import_pyplot(
    tmp_path: Path, features: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails, even if another test has
    draw_sheet(rows(features, features), tmp_path / "pca.png", runner=RUNNER)


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


def test_values_that_are_not_finite_are_black(features: list[torch.Tensor]) -> None:
    broken = [f.clone() for f in features]
    broken[0][5] = torch.nan
    broken[0][6, 3] = torch.inf
    _, bundle = pca_colours(features, broken)
    assert bundle[0][5:7].tolist() == [[0, 0, 0]] * 2


def spoil(features: list[torch.Tensor], *patches: tuple[int, int]) -> list[torch.Tensor]:
    """Change patches of the first photograph, each by less than the one before."""
    changed = [f.clone() for f in features]
    for place, (row, column) in enumerate(patches):
        changed[0][SIDE * row + column] += (20.0 - 4 * place) * torch.randn(
            WIDTH, generator=torch.Generator().manual_seed(place)
        )
    return changed


def colour(name: str) -> tuple[int, ...]:
    return ImageColor.getrgb(name)


def framed(panel: np.ndarray, shade: str) -> tuple[int, int, int, int]:
    """Return the top, left, bottom and right of the area with this colour."""
    places = np.argwhere((panel == colour(shade)).all(axis=-1))
    (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
    return int(top), int(left), int(bottom), int(right)


def test_worst_patch_is_framed_where_it_lies(features: list[torch.Tensor]) -> None:
    changed = spoil(features, (3, 9))
    (photograph, *others), (exact, *_), *_ = strips(features, changed, mark=1)
    cell = len(photograph) // SIDE
    top, left, bottom, right = framed(photograph, pca.WORST)
    frame = len(photograph) // pca.PANEL_OF_ONE_PIXEL
    assert (top + frame, left + frame) == (3 * cell, 9 * cell)
    assert (bottom + 1 - frame, right + 1 - frame) == (4 * cell, 10 * cell)
    inside = photograph[3 * cell : 4 * cell, 9 * cell : 10 * cell]
    assert (inside == (200, 0, 0)).all(), "the frame must lie around its patch, not on it"
    assert not any((panel == colour(pca.WORST)).all(axis=-1).any() for panel in others)
    assert (exact == (200, 0, 0)).all(), "an exact photograph must have no worst patch"


def test_next_worst_patches_have_another_colour_and_mark_limits_their_number(features: list[torch.Tensor]) -> None:
    changed = spoil(features, (3, 9), (12, 2), (8, 13))
    two = strips(features, changed, mark=2)[0][0]
    cell = len(two) // SIDE
    top, left, bottom, right = framed(two, pca.WORSE)
    assert (top // cell, left // cell) == (11, 1)
    assert (bottom // cell, right // cell) == (13, 3)


def test_frame_at_the_border_stays_whole(features: list[torch.Tensor]) -> None:
    for row, column in ((0, 0), (SIDE - 1, SIDE - 1), (0, SIDE - 1)):
        changed = spoil(features, (row, column))
        panel = strips(features, changed, mark=1)[0][0]
        cell, frame = len(panel) // SIDE, len(panel) // pca.PANEL_OF_ONE_PIXEL
        top, left, bottom, right = framed(panel, pca.WORST)
        edge = (panel == colour(pca.EDGE)).all(axis=-1)
        assert min(bottom - top, right - left) >= cell
        assert all(edge[line].any() for line in (top - 1, bottom + 1))
        assert (panel[top : top + frame, left : right + 1] == colour(pca.WORST)).all()


def test_patch_that_is_not_finite_is_the_worst_and_pink_among_the_errors(features: list[torch.Tensor]) -> None:
    changed = spoil(features, (3, 9))
    changed[0][SIDE * 5 + 6, 2] = torch.nan
    panel, _, _, error = strips(features, changed, mark=1)[0]
    cell = len(panel) // SIDE
    top, left, _, _ = framed(panel, pca.WORST)
    assert ((top + cell // 2) // cell, (left + cell // 2) // cell) == (5, 6)
    assert framed(error, pca.WORST) == (5 * cell, 6 * cell, 6 * cell - 1, 7 * cell - 1)


def test_error_panel_is_white_at_the_limit_and_black_far_below(features: list[torch.Tensor]) -> None:
    changed = spoil(features, (3, 9))
    error = strips(features, changed)[0][3]
    cell = len(error) // SIDE
    assert (error[3 * cell : 4 * cell, 9 * cell : 10 * cell] == 255).all()
    assert (error == 0).all(axis=-1).sum() == error[..., 0].size - cell**2


def test_sheet_frames_nothing(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    sheet = Sheet(rows(features, spoil(features, (3, 9))), tmp_path / "pca.png")
    assert not (sheet.pixels == colour(pca.WORST)).all(axis=-1).any()


def test_name_with_dollar_signs_is_not_parsed_as_math(tmp_path: Path, features: list[torch.Tensor]) -> None:
    pytest.importorskip("matplotlib")
    row = replace(rows(features[:1], features[:1])[0], name=r"$\frac{$.png")
    assert row.name in Sheet([row], tmp_path / "pca.png").boxes


@pytest.mark.parametrize(("patches", "width"), [(1, 24), (4, 1), (9, 2)])
def test_few_patches_and_narrow_features_are_drawn(patches: int, width: int) -> None:
    features = [torch.randn(patches, width, generator=torch.Generator().manual_seed(1))]
    assert len(draw_strips(rows(features, features), panel=PANEL, limit=1e-3)) == 1


def test_reference_that_is_not_finite_does_not_change_the_basis(features: list[torch.Tensor]) -> None:
    broken = [f.clone() for f in features]
    broken[0][5] = torch.nan
    reference, _ = pca_colours(broken, features)
    whole, _ = pca_colours(features, features)
    assert reference[0][5].tolist() == [0, 0, 0]
    assert (reference[1].int() - whole[1].int()).abs().float().mean() < 3
    nothing, _ = pca_colours([torch.full((4, 3), torch.nan)], [torch.ones(4, 3)])
    assert nothing[0].tolist() == [[0, 0, 0]] * 4
