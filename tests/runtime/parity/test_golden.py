"""The golden answers are those of the whole model, in a file that any tool can read, and nothing else is accepted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from PIL import Image

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GOLDEN
from trtower.bundle.staging import describe, write_manifest
from trtower.dtypes import DTYPES
from trtower.errors import BundleError, CheckpointError
from trtower.parity.golden import MOST_BYTES, Golden, GoldenImage, count_images, sample_tokens
from trtower.parity.verify import verify
from trtower.spec import TensorSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check import samples
from trtower_export.check.photographs import load_photographs
from trtower_export.pipeline import ExportOptions, export_tower

LAYERS = {"fp32": "float16", "fp16": "float16", "bf16": "bfloat16"}
"""The dtype of golden inputs in each precision: FP32 engines are given numbers of FP16."""


@pytest.mark.parametrize("precision", LAYERS)
def test_answers_are_those_of_transformers_own_model(
    checkpoints: dict[str, Path], export: Callable[..., Path], precision: str
) -> None:
    golden = Golden.read(Bundle.open(export("clip", precision=precision, flavour="none", select_layer=(-2, -4))))
    model = transformers.CLIPVisionModel.from_pretrained(checkpoints["clip"]).eval()
    assert golden.pixel_values.dtype == DTYPES[LAYERS[precision]]
    with torch.no_grad():
        states = model(pixel_values=golden.pixel_values.float(), output_hidden_states=True).hidden_states
    expected = torch.cat([states[-2], states[-4]], dim=-1)
    assert [*golden.tokens] == [*range(10)]
    torch.testing.assert_close(golden.answers, expected, rtol=1e-5, atol=1e-5)  # there, all images ran at once
    assert golden.answers.dtype == torch.float32


def test_inputs_are_photographs_and_a_drawn_image_as_the_processor_prepares_them(clip_bundle: Path) -> None:
    golden = Golden.read(Bundle.open(clip_bundle))
    assert [(image.name, image.kind) for image in golden.images] == [
        ("astronaut.png", "photograph"),
        ("squares", "saturated"),
        ("chelsea.png", "photograph"),
    ]
    processor = ImageProcessor.from_file(clip_bundle / "preprocessor_config.json")
    astronaut = load_photographs(None, limit=1).images[0].image
    expected = processor(astronaut, return_tensors="pt")["pixel_values"].half()
    assert torch.equal(golden.pixel_values[:1], expected)


def test_any_tool_can_read_the_file(clip_bundle: Path) -> None:
    with safetensors.safe_open(clip_bundle / GOLDEN, "pt") as file:
        assert sorted(file.keys()) == ["hidden_states", "pixel_values", "tokens"]
        assert "uncut, FP32" in json.loads(file.metadata()["golden"])["reference"]
    assert (clip_bundle / GOLDEN).stat().st_mode & 0o044, "a service of another user cannot read it"


def test_without_the_demos_photographs_images_are_drawn(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    options = ExportOptions(check=False, flavour="none", precision="fp32")
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "bundle", options)
    assert [image.name for image in Golden.read(bundle).images] == ["squares", "noise"]
    assert verify(bundle).passed


def test_users_photographs_never_go_into_a_bundle(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.effect_noise((50, 50), 64).convert("RGB").save(tmp_path / "photos" / "secret.png")
    options = ExportOptions(flavour="none", precision="fp32", images=tmp_path / "photos")
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "bundle", options)
    assert bundle.manifest.certificate
    assert [image.name for image in bundle.manifest.certificate.images] == ["secret.png"]
    assert "secret.png" not in [image.name for image in Golden.read(bundle).images]


def test_model_that_is_not_finite_has_no_golden_answers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.CLIPVisionModel.from_pretrained(checkpoints["clip"])
    bias = next(value for name, value in model.named_parameters() if name.endswith("layers.0.mlp.fc1.bias"))
    bias.data[0] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"is not finite in FP32 on astronaut\.png.*trtower doctor"):
        export_tower(str(tmp_path / "broken"), tmp_path / "bundle", ExportOptions(check=False, flavour="none"))
    assert not (tmp_path / "bundle").exists()


def output(tokens: int, width: int) -> TensorSpec:
    return TensorSpec(name="hidden_states", dtype="float32", shape=("batch", tokens, width))


@pytest.mark.parametrize(
    ("size", "tokens", "width"),
    [
        *[(336, 577, 1024), (224, 257, 1024), (384, 729, 1152), (448, 1025, 1024), (896, 4096, 1152)],
        *[(336, 577, 5120), (224, 257, 1664 * 48), (448, 1025, 3200 * 45)],
    ],
)
def test_file_stays_under_8_mb_for_every_size(tmp_path: Path, size: int, tokens: int, width: int) -> None:
    images = tuple(GoldenImage(name=f"{place}.png", kind="photograph") for place in range(3))
    count = count_images(images, 3 * size * size * 2)
    pixels = torch.zeros(count, 3, size, size, dtype=torch.float16)
    kept = sample_tokens(output(tokens, width), count, pixels.nbytes)
    answers = torch.zeros(count, len(kept), width)
    golden = Golden(images=images[:count], pixel_values=pixels, tokens=kept, answers=answers, reference="a model")
    input_ = TensorSpec(name="pixel_values", dtype="float16", shape=("batch", 3, size, size))
    golden.write(tmp_path / GOLDEN, input_, output(tokens, width))
    assert (tmp_path / GOLDEN).stat().st_size < MOST_BYTES
    assert count == (1 if size == 896 else 3)
    assert [int(kept[0]), int(kept[-1])] == [0, tokens - 1]
    assert len(set(kept.tolist())) == len(kept)
    assert len(kept) == tokens or (tmp_path / GOLDEN).stat().st_size > 0.8 * MOST_BYTES


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> None:
    """Change the tensors of a golden file and what it says about them, and its hash in the manifest."""
    tensors = safetensors.torch.load_file(folder / GOLDEN)
    with safetensors.safe_open(folder / GOLDEN, "pt") as file:
        about = json.loads(file.metadata()["golden"])
    change(tensors, about)
    safetensors.torch.save_file(tensors, folder / GOLDEN, {"golden": json.dumps(about)})
    fit(folder)


def fit(folder: Path) -> None:
    manifest = Bundle.open(folder, whole=False).manifest
    write_manifest(folder, replace(manifest, files=manifest.files | {GOLDEN: describe(folder / GOLDEN)}))


def cut_images(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    del about["images"][1:]


def no_images(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    about["images"] = []
    tensors |= {name: tensors[name][:0] for name in ("pixel_values", "hidden_states")}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors, about: tensors.pop("tokens"), "'tokens'"),
        (lambda tensors, about: about.pop("reference"), "'reference'"),
        (cut_images, r"pixel_values has shape \(3, 3, 42, 42\) for 1 images"),
        (no_images, "for 0 images"),
        (
            lambda tensors, about: tensors.update(pixel_values=tensors["pixel_values"].float()),
            "has dtype torch.float32",
        ),
        (lambda tensors, about: tensors.update(tokens=tensors["tokens"] + 1), "tokens are not all among the 10"),
        (lambda tensors, about: tensors.update(tokens=tensors["tokens"][1:]), "hidden_states has shape"),
        (lambda tensors, about: tensors.update(tokens=tensors["tokens"].bool()), "tokens has 1 dimensions and dtype"),
        (lambda tensors, about: tensors.update(tokens=tensors["tokens"][:, None]), "tokens has 2 dimensions"),
        (lambda tensors, about: tensors.update(hidden_states=tensors["hidden_states"].half()), "dtype torch.float16"),
        (lambda tensors, about: about["images"][0].update(name=1), "by something else than text"),
        (lambda tensors, about: about.update(reference=None), "by something else than text"),
    ],
    ids=[
        "no tokens",
        "no reference",
        "fewer images",
        "no image",
        "other dtype",
        "other tokens",
        "fewer tokens",
        "mask",
        "column",
        "half",
        "number",
        "null",
    ],
)
def test_file_of_another_bundle_is_refused(spoilt: Path, change: Any, problem: str) -> None:
    rewrite(spoilt, change)
    with pytest.raises(BundleError, match=rf"golden\.safetensors does not belong to this bundle: .*{problem}"):
        verify(Bundle.open(spoilt))


def test_file_that_is_not_safetensors_is_refused(spoilt: Path) -> None:
    (spoilt / GOLDEN).write_bytes(b"not a file of tensors")
    fit(spoilt)
    with pytest.raises(BundleError, match="does not belong to this bundle"):
        verify(Bundle.open(spoilt))


def test_altered_file_is_refused(spoilt: Path) -> None:
    content = bytearray((spoilt / GOLDEN).read_bytes())
    content[-1] ^= 1
    (spoilt / GOLDEN).write_bytes(content)
    with pytest.raises(BundleError, match=r"golden\.safetensors was altered"):
        verify(Bundle.open(spoilt))


def test_file_cut_short_or_missing_is_refused(spoilt: Path) -> None:
    content = (spoilt / GOLDEN).read_bytes()
    (spoilt / GOLDEN).write_bytes(content[:100])
    with pytest.raises(BundleError, match=r"golden\.safetensors has 100 bytes; tower\.json says"):
        Bundle.open(spoilt)
    (spoilt / GOLDEN).unlink()
    with pytest.raises(BundleError, match=r"golden\.safetensors is missing"):
        Bundle.open(spoilt)


def test_bundle_of_an_older_trtower_is_told_what_to_do(spoilt: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(spoilt).manifest
    files = {name: entry for name, entry in manifest.files.items() if name != GOLDEN}
    write_manifest(spoilt, replace(manifest, files=files))
    (spoilt / GOLDEN).unlink()
    old = Bundle.open(spoilt)
    with pytest.raises(BundleError, match=r"an older trtower exported it: export it again, or .* `trtower check`"):
        verify(old)
    assert Bundle.open(shutil.copytree(spoilt, tmp_path / "copy")).manifest.files.keys() == files.keys()
