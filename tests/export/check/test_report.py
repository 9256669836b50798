"""The report page shows what the certificate says, and shows bad results first."""

import base64
import gc
import io
import re
import weakref
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tests.export import made_up
from trtower.bundle.bundle import Bundle
from trtower.errors import BundleError, InputError, MissingExtraError
from trtower.spec import BatchProfile, TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.evidence import ImageEvidence
from trtower_export.check.report import pca
from trtower_export.check.report.plots import draw_layers
from trtower_export.check.report.report import Report, as_image, describe_worst, make_folder

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


class Page(HTMLParser):
    """A page as a browser would parse it: its tags, its text, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._hidden = 0
        self._cell = False
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag in ("style", "title")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("style", "title")
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        self.words.append(data)
        if self._cell:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()

    def images(self) -> list[bytes]:
        prefix = "data:image/png;base64,"
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith(prefix) for source in sources)
        return [base64.b64decode(source.removeprefix(prefix), validate=True) for source in sources]


def write(folder: Path, *evidence: ImageEvidence, spec: TowerSpec = made_up.SPEC, **changes: object) -> Page:
    """Write the report of this evidence, and parse its page."""
    report = Report(spec, made_up.PROCESSOR, keep=2)
    for one in evidence:
        report.see(one)
    path = report.write(folder, made_up.bundle(spec, **changes))
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def five() -> list[ImageEvidence]:
    errors = {"b.png": 0.03, "c.png": 0.4, "a.png": 0.002, "e.png": 0.1, "d.png": 0.0005}
    return [made_up.evidence(name, error=error, seed=seed) for seed, (name, error) in enumerate(errors.items())]


def test_page_needs_no_other_file_and_no_network(tmp_path: Path, five: list[ImageEvidence]) -> None:
    page = write(tmp_path, *five, layers=made_up.layers())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", page.html))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})
    assert not any("href" in attributes or "srcset" in attributes for _, attributes in page.tags)
    assert len(page.images()) == 2 + 4


def test_every_picture_is_a_png_beside_the_page(tmp_path: Path, five: list[ImageEvidence]) -> None:
    page = write(tmp_path, *five, layers=made_up.layers())
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert sorted(files) == [
        *(f"report-best-{place}.png" for place in (1, 2)),
        "report-layers.png",
        "report-tokens.png",
        *(f"report-worst-{place}.png" for place in (1, 2)),
    ]
    assert sorted(page.images()) == sorted(files.values())
    for png in files.values():
        with Image.open(io.BytesIO(png)) as image:
            image.verify()
            assert image.format == "PNG"


def test_page_says_passed_only_if_the_check_passed(tmp_path: Path) -> None:
    good = write(tmp_path, made_up.evidence())
    bad = write(tmp_path, made_up.evidence(), bounds=made_up.bounds(0.98))
    assert "Passed" in good.text
    assert "FAILED" not in good.html
    assert "FAILED" in bad.text
    assert "Passed" not in bad.html
    assert "REHEARSAL" not in good.html


def test_missed_bound_is_shown_with_measured_and_required_value(tmp_path: Path) -> None:
    page = write(tmp_path, made_up.evidence(), bounds=(*made_up.bounds(0.98)[:3], *made_up.bounds()[3:]))
    missed = [row for row in page.rows if "MISSED" in row]
    assert missed == [["MISSED", "cosine of the worst token", "photographs", "0.980000", "≥ 0.999"]]
    assert sum(row[0] == "holds" for row in page.rows) == 5
    assert "1 of 6 bounds missed" in page.text


def test_rehearsal_is_shown_as_one(tmp_path: Path) -> None:
    assert "REHEARSAL" in write(tmp_path, made_up.evidence(), random_weights=True).text


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">&amp;.png'
    page = write(
        tmp_path,
        made_up.evidence(name),
        name=name,
        images=(replace(made_up.certificate().images[0], name=name),),
        layers=made_up.layers(image=name),
        skipped=(name,),
        keep_fp32=(name,),
        machine=name,
    )
    assert not any("onerror" in attributes for _, attributes in page.tags)
    # Once each in heading, island, picture, table, skipped files and machine, and in four layers.
    assert page.text.count(name) == 6 + 4


def test_page_says_what_ran_where(tmp_path: Path) -> None:
    page = write(tmp_path, made_up.evidence())
    assert "ONNX graph on onnxruntime 1.32.0, CPU" in page.text
    assert "not run on a GPU" in page.text
    assert f"Built, not run {made_up.PLAN}" in page.text
    assert "Dinov2Model of transformers 5.23.0, uncut, FP32 on the CPU" in page.text
    assert "Emulation" not in page.text
    gpu = write(
        tmp_path,
        made_up.evidence(),
        ran="plan",
        executed=(made_up.PLAN,),
        not_run=(),
        runner="tensorrt 11",
        gpu="NVIDIA L4",
    )
    assert "TensorRT plan on tensorrt 11" in gpu.text
    assert "GPU NVIDIA L4" in gpu.text
    assert "not run" not in gpu.text
    emulated = write(tmp_path, made_up.evidence(), precision="bf16", backend="emulated-bf16")
    assert "Emulation" in emulated.text
    assert "sums of a LayerNorm" not in emulated.text  # only rounded in FP16


def test_figures_that_are_not_finite_are_shown_as_such(tmp_path: Path) -> None:
    broken = made_up.figures(None, None, non_finite=1234)
    page = write(tmp_path, made_up.evidence(), bundle=broken, bounds=made_up.bounds(None))
    row = next(row for row in page.rows if row[0].startswith("bundle"))
    assert (row[2], row[4], row[6]) == ("not finite", "not finite", "1,234")
    assert "None" not in page.text
    assert "nan" not in page.text.lower().replace("nan or inf", "").replace("nan or infinite values", "")


def test_best_and_worst_photographs_are_shown_in_order(tmp_path: Path, five: list[ImageEvidence]) -> None:
    page = write(tmp_path, *five)
    captions = re.findall(r"<figcaption><b>(.*?)</b>", page.html)
    assert captions == ["c.png", "e.png", "d.png", "a.png"]
    assert page.text.index("The worst photographs") < page.text.index("c.png worst")
    assert page.text.index("e.png worst") < page.text.index("The best photographs") < page.text.index("d.png worst")


def test_photograph_that_is_not_finite_is_the_worst(tmp_path: Path, five: list[ImageEvidence]) -> None:
    broken = five[4].bundle.clone()
    broken[6, 3] = torch.inf
    page = write(tmp_path, *five[:4], replace(five[4], bundle=broken))
    assert re.findall(r"<figcaption><b>(.*?)</b>", page.html)[0] == "d.png"
    assert "d.png worst token: row 1, column 1, cosine not finite" in page.text


def test_bundle_without_finite_values_has_no_worst_patch_and_no_histogram(tmp_path: Path) -> None:
    broken = replace(made_up.evidence("a.png"), bundle=torch.full_like(made_up.evidence().bundle, torch.nan))
    page = write(tmp_path, broken, bounds=made_up.bounds(None))
    assert "a.png no token is finite" in page.text
    assert "No token of the bundle is finite" in page.text
    assert len(page.images()) == 1
    with Image.open(io.BytesIO(page.images()[0])) as strip:
        photograph = np.asarray(strip)[:, : strip.height]
    assert not (photograph == ImageColor.getrgb(pca.WORST)).all(-1).any()


def test_verdict_names_three_of_many_missed_bounds(tmp_path: Path) -> None:
    missed = [replace(bound, holds=False) for bound in made_up.bounds()]
    page = write(tmp_path, made_up.evidence(), bounds=missed)
    assert "6 of 6 bounds missed" in page.text
    assert "; and 3 more, listed below." in page.text


def test_no_photograph_is_shown_twice(tmp_path: Path, five: list[ImageEvidence]) -> None:
    three = write(tmp_path, *five[:3])
    assert re.findall(r"<figcaption><b>(.*?)</b>", three.html) == ["c.png", "b.png", "a.png"]
    one = write(tmp_path, five[0])
    assert re.findall(r"<figcaption><b>(.*?)</b>", one.html) == ["b.png"]
    assert "The photograph" in one.text
    assert "The best" not in one.text


def test_caption_names_the_worst_token() -> None:
    spec = made_up.SPEC  # 1 + 4 x 4 tokens
    distances = torch.zeros(17, dtype=torch.float64)
    assert describe_worst(distances, spec) == "every token equals PyTorch's"
    distances[1 + 4 * 2 + 3] = 1e-3
    assert describe_worst(distances, spec) == "worst token: row 2, column 3, cosine 0.999000"
    distances[0] = 2e-3
    assert describe_worst(distances, spec) == (
        "worst token: prefix token 0, cosine 0.998000; worst patch: row 2, column 3, cosine 0.999000"
    )


def test_worst_patch_is_outlined_in_the_photograph(tmp_path: Path) -> None:
    from trtower_export.check.report import pca

    one = made_up.evidence(error=0.0)
    one.bundle[1 + 4 * 2 + 1] *= -1  # row 2, column 1
    one.bundle[0] *= -1  # a prefix token is not a patch
    write(tmp_path, one)
    photograph = np.asarray(Image.open(tmp_path / "report-worst-1.png").convert("RGB"))
    cell = len(photograph) // 4
    pink = np.argwhere((photograph[:, : 4 * cell] == (0xFF, 0x2D, 0x95)).all(axis=-1))
    frame = len(photograph) // pca.PANEL_OF_ONE_PIXEL
    assert pink.min(axis=0).tolist() == [2 * cell - frame, cell - frame]
    assert pink.max(axis=0).tolist() == [3 * cell + frame - 1, 2 * cell + frame - 1]


def test_only_tokens_of_the_best_and_the_worst_are_kept() -> None:
    report = Report(made_up.SPEC, made_up.PROCESSOR, keep=2)
    watched = []
    for seed in range(40):
        one = made_up.evidence(f"{seed}.png", error=1e-5 * 1.4 ** (seed * 7 % 40), seed=seed)
        watched += [weakref.ref(tensor) for tensor in (one.reference, one.bundle, one.torch, one.pixel_values)]
        report.see(one)
    del one
    gc.collect()
    assert not any(tensor() is not None for tensor in watched), "see() must not keep the evidence"
    assert sorted(row.name for _, row in report._worst + report._best) == ["0.png", "17.png", "23.png", "34.png"]
    kept = [tensor for distances in report._distances.values() for tensor in distances]
    assert sum(tensor.numel() for tensor in kept) == 2 * 40 * 17


def test_kept_tokens_do_not_keep_their_batch() -> None:
    report = Report(made_up.SPEC, made_up.PROCESSOR)
    one = made_up.evidence()
    batch = torch.stack([one.bundle] * 50)
    report.see(replace(one, bundle=batch[0]))
    ((_, kept),) = report._worst
    assert kept.bundle.untyped_storage().nbytes() == 16 * 24 * 4


def test_page_says_if_layers_were_not_compared(tmp_path: Path) -> None:
    without = write(tmp_path, made_up.evidence())
    assert "Run trtower check --report to add this" in without.text
    assert not (tmp_path / "report-layers.png").exists()
    compared = write(tmp_path, made_up.evidence(), layers=made_up.layers())
    assert "--report" not in compared.text
    assert "No layer's error jumps" in compared.text
    assert ["3 read", "1.90e-03", "1.71e-03", "0.999400", "a.png", "row 1, column 2"] in compared.rows


def test_layers_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    page = write(tmp_path, made_up.evidence(), layers=made_up.layers((1e-3, 1e-3, None)))
    assert "Hidden state 2 is the first that is not finite; PyTorch's own is not finite either" in page.text
    assert next(row for row in page.rows if row[0] == "2")[1:3] == ["not finite", "not finite"]


def test_first_jump_is_named_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = []

    def spy(*args: Any, first_jump: int | None, **options: Any) -> bytes:
        marked.append(first_jump)
        return draw_layers(*args, first_jump=first_jump, **options)

    monkeypatch.setattr("trtower_export.check.report.report.draw_layers", spy)
    even = replace(made_up.layers()[0], torch=made_up.figures(relative_error=1e-4))
    steady = tuple(replace(even, layer=layer) for layer in range(4))
    write(tmp_path, made_up.evidence(), layers=steady)
    jump = replace(steady[2], bundle=made_up.figures(relative_error=2e-3))
    page = write(tmp_path, made_up.evidence(), layers=(*steady[:2], jump, steady[3]))
    assert marked == [None, 2]
    assert "The error jumps at hidden state 2 ," in page.text
    assert "It is worst in a.png, row 1, column 2." in page.text


def test_skipped_files_are_counted_and_named(tmp_path: Path) -> None:
    page = write(tmp_path, made_up.evidence(), skipped=("torn.jpg", "half.png"))
    assert "2 files could not be read and were skipped: torn.jpg, half.png." in page.text
    assert "could not be read" not in write(tmp_path, made_up.evidence()).text


def test_drawn_images_are_in_the_table_and_in_no_picture(tmp_path: Path) -> None:
    row = made_up.certificate().images[0]
    page = write(
        tmp_path,
        made_up.evidence("a.png"),
        made_up.evidence("noise 0", kind="noise", error=0.5),
        images=(row, replace(row, name="noise 0", kind="noise")),
    )
    assert "1 photograph and 1 drawn image (noise)" in page.text
    assert any(row[0] == "noise 0 noise" for row in page.rows)
    assert re.findall(r"<figcaption><b>(.*?)</b>", page.html) == ["a.png"]


def test_page_says_that_batches_beyond_the_profile_are_split(tmp_path: Path) -> None:
    batches = tuple(replace(made_up.certificate().batches[0], batch=batch) for batch in (1, 8, 19))
    rows = [row[0] for row in write(tmp_path, made_up.evidence(), batches=batches).rows]
    assert {"1 in one call", "8 in one call", "19 split into calls of at most 8"} <= set(rows)


def test_operations_kept_in_fp32_are_named(tmp_path: Path) -> None:
    assert "What stays in FP32" not in write(tmp_path, made_up.evidence()).text
    page = write(tmp_path, made_up.evidence(), keep_fp32=("layers.1.mlp.fc2", "layers.1.add"))
    assert "2 operations stay in FP32 inside the FP16 graph: layers.1.mlp.fc2 , layers.1.add" in page.text


def test_appendix_has_every_hash_and_version(tmp_path: Path) -> None:
    page = write(tmp_path, made_up.evidence())
    manifest = made_up.manifest()
    for entry in manifest.files.values():
        assert entry.sha256 in page.text
    assert manifest.certificate.images_sha256 in page.text
    assert manifest.source.weights_sha256["float32"] in page.text
    roles = {row[0]: row[-1] for row in page.rows if row[0] in manifest.files}
    assert roles == {
        "config.json": "certified",
        "preprocessor_config.json": "certified",
        "tower.onnx": "executed",
        "tower.onnx.data": "executed",
        made_up.PLAN: "built, not run",
    }
    for word in ("x86_64, 2 threads", "transformers 5.23.0", "onnx 1.22.0", "2026-11-23"):
        assert word in page.text


def test_earlier_report_is_replaced_and_nothing_else_is_touched(tmp_path: Path, five: list[ImageEvidence]) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    write(tmp_path, *five, layers=made_up.layers(), name="the-old-one")
    page = write(tmp_path, five[0])
    assert "the-old-one" not in page.html
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine.png",
        "report-tokens.png",
        "report-worst-1.png",
        "report.html",
    ]


def test_file_instead_of_the_folder_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file or inside one, but a report needs a folder") as caught:
            make_folder(folder)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError):
            write(folder, made_up.evidence())
    make_folder(tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "er").is_dir()


def test_bundle_without_certificate_has_nothing_to_report(tmp_path: Path) -> None:
    bundle = made_up.bundle()
    with pytest.raises(BundleError, match="no certificate to report: run trtower check"):
        Report(made_up.SPEC, made_up.PROCESSOR).write(
            tmp_path, Bundle(bundle.path, replace(bundle.manifest, certificates=()))
        )


def test_missing_package_is_named_before_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"jinja2.*pip install .*\[report\]"):
        Report(made_up.SPEC, made_up.PROCESSOR)


def test_page_without_evidence_is_written(tmp_path: Path) -> None:
    page = write(tmp_path, images=(), batches=(), versions={})
    assert "There are no photographs to show" in page.text
    assert page.images() == []
    drawn = write(tmp_path, made_up.evidence(kind="constant"))
    assert "There are no photographs to show" in drawn.text
    assert len(drawn.images()) == 1


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize(("image_size", "width", "layers"), [(56, 24, (1, 4, 5)), (14, 2, (3,)), (28, 1, (0,))])
def test_towers_of_any_shape_are_reported(
    tmp_path: Path, num_prefix_tokens: int, image_size: int, width: int, layers: tuple[int, ...]
) -> None:
    spec = replace(made_up.SPEC, num_prefix_tokens=num_prefix_tokens, image_size=image_size, width=width, layers=layers)
    nothing = made_up.evidence("c.png", spec=spec)
    nothing.bundle.fill_(torch.nan)
    page = write(
        tmp_path, made_up.evidence(spec=spec), made_up.evidence("b.png", error=0, spec=spec), nothing, spec=spec
    )
    assert len(page.images()) == 4


def test_fp32_bundle_is_reported(tmp_path: Path) -> None:
    page = write(tmp_path, made_up.evidence(error=0), precision="fp32", torch=made_up.figures(1.0, 0.0))
    assert "The bundle is in FP32, like the reference" in page.text


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [60, 50, 55]},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_photograph_is_shown_as_the_tower_received_it(config: dict[str, object]) -> None:
    processor = ImageProcessor({"size": 56, "crop_size": 56, **config})
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    pixel_values = processor.preprocess(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    assert np.array_equal(np.asarray(as_image(pixel_values, processor)), pixels)


def test_page_states_the_profile(tmp_path: Path) -> None:
    page = write(tmp_path, made_up.evidence(), profiles=(BatchProfile(min=2, opt=3, max=5),))
    assert "accepts 2 to 5 images per call and is tuned for 3" in page.text
