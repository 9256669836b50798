"""An export reports what its user may not expect, and the manifest keeps it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import make_model
from tests.export.checkpoint.test_layouts import LLAMA, TEXT, save_composite
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import MANIFEST, TO_PAD
from trtower.errors import BundleError
from trtower.inspection import as_text, inspect_bundle
from trtower_export.pipeline import ExportOptions, export_tower

Export = Callable[..., tuple[Bundle, str]]


@pytest.fixture
def say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Export:
    """Export without a plan or a check; return the bundle and the log."""

    def export(source: Path, **options: Any) -> tuple[Bundle, str]:
        caplog.clear()
        with caplog.at_level("INFO"):
            bundle = export_tower(
                str(source), tmp_path / "b", ExportOptions(flavour="none", check=False, overwrite=True, **options)
            )
        return bundle, caplog.text

    return export


def original_llava(folder: Path, tower: Path, **config: Any) -> Path:
    folder.mkdir()
    save_file({"lm_head.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    written = {"model_type": "llava_llama", "mm_vision_tower": str(tower), "mm_vision_select_layer": -2, **config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("ratio", ["pad", "anyres", "anyres_max_9", "highres", "resize"])
def test_padding_and_tiling_of_a_llava_stay_with_the_caller(
    checkpoints: dict[str, Path], tmp_path: Path, say: Export, ratio: str
) -> None:
    bundle, log = say(original_llava(tmp_path / "llava", checkpoints["clip"], image_aspect_ratio=ratio))
    call = "process_images([image], tower.image_processor, model.config)"
    assert f"by {ratio}: {TO_PAD}" in log
    assert call in log
    inspection = inspect_bundle(bundle)
    assert f"by {ratio}: {TO_PAD}" in as_text(inspection)
    assert inspection.source.image_aspect_ratio == ratio
    assert Bundle.open(bundle.path).manifest.source.image_aspect_ratio == ratio


@pytest.mark.parametrize("config", [{}, {"image_aspect_ratio": "square"}, {"image_aspect_ratio": None}])
def test_llava_that_neither_pads_nor_tiles_gets_no_remark(
    checkpoints: dict[str, Path], tmp_path: Path, say: Export, config: dict[str, Any]
) -> None:
    bundle, log = say(original_llava(tmp_path / "llava", checkpoints["clip"], **config))
    assert "padding" not in log + as_text(inspect_bundle(bundle))


@pytest.mark.parametrize(("kind", "ratio"), [("LlavaImageProcessor", "pad"), ("LlavaNextImageProcessorFast", "anyres")])
def test_padding_and_tiling_of_transformers_stay_with_its_own_processor(
    tmp_path: Path, say: Export, kind: str, ratio: str
) -> None:
    save_composite("Llava", "clip", tmp_path / "llava", text_config=LLAMA)
    written = {"image_processor_type": kind, "do_pad": True, "resample": 3}
    written |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "llava" / "preprocessor_config.json").write_text(json.dumps(written))
    bundle, log = say(tmp_path / "llava")
    assert f"by {ratio}: {TO_PAD}" in log
    assert "AutoProcessor" in log
    assert bundle.manifest.source.image_aspect_ratio == ratio
    assert "AutoProcessor" in as_text(inspect_bundle(bundle))


def test_size_that_does_not_fit_names_the_nearest_that_do(checkpoints: dict[str, Path], say: Export) -> None:
    log = say(checkpoints["clip"], image_size=57)[1]
    assert "57 pixels are not a multiple of the patch size 14: the last 1 of each row and column are not read" in log
    assert "the nearest sizes that fit are 56 and 70" in log
    assert "not a multiple" not in say(checkpoints["clip"], image_size=56)[1]


def test_size_of_a_config_that_does_not_fit_is_reported_too(tmp_path: Path, say: Export) -> None:
    make_model("siglip", image_size=45).save_pretrained(tmp_path / "siglip")
    assert "the last 3 of each row and column are not read; the nearest sizes" in say(tmp_path / "siglip")[1]


@pytest.mark.parametrize(("kind", "family"), [("CLIP", "clip"), ("Siglip", "siglip")])
def test_remark_on_an_embedding_model_says_that_features_come_out(
    tmp_path: Path, say: Export, kind: str, family: str
) -> None:
    save_composite(kind, family, tmp_path / "m", text_config=TEXT)
    log = say(tmp_path / "m")[1]
    assert f"this {kind.lower()} model embeds an image as one pooled vector" in log
    assert "the features of hidden state 3 of 4 layers, patch tokens, not the pooled embedding" in log
    assert "LLaVA's default, hidden state -2" in log
    log = say(tmp_path / "m", select_layer=-1)[1]
    assert "not the pooled embedding" in log
    assert "LLaVA's default" not in log


def test_default_layer_of_a_vision_model_is_reported(checkpoints: dict[str, Path], say: Export) -> None:
    log = say(checkpoints["clip"])[1]
    assert "does not say which layer to read: using LLaVA's default, hidden state -2; choose another with" in log
    assert "pooled" not in log
    assert "LLaVA's default" not in say(checkpoints["clip"], select_layer=-2)[1]


def test_layer_from_a_config_is_not_reported_as_a_default(tmp_path: Path, say: Export) -> None:
    save_composite("Llava", "clip", tmp_path / "llava", text_config=LLAMA)
    assert "LLaVA's default" not in say(tmp_path / "llava")[1]


def edit_source(bundle: Path, **changes: Any) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    data["source"] = {key: value for key, value in {**data["source"], **changes}.items() if value is not ...}
    (bundle / MANIFEST).write_text(json.dumps(data))


def test_older_bundle_is_read_without_the_keys_that_have_defaults(spoilt: Path) -> None:
    edit_source(spoilt, image_aspect_ratio=..., tower=...)
    source = Bundle.open(spoilt).manifest.source
    assert (source.image_aspect_ratio, source.tower) == (None, None)
    assert as_text(inspect_bundle(Bundle.open(spoilt)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "missing none; unknown colour"),
        ({"revision": ...}, "missing revision; unknown none"),
        ({"image_aspect_ratio": 5}, "image_aspect_ratio is 5; expected str"),
        ({"tower": ["a"]}, r"tower is \['a'\]; expected str"),
    ],
)
def test_unknown_missing_or_mistyped_keys_are_refused(spoilt: Path, changes: dict[str, Any], said: str) -> None:
    edit_source(spoilt, **changes)
    with pytest.raises(BundleError, match=said):
        Bundle.open(spoilt)
