"""FP8 and INT8 use 8 bits in the linear layers and nowhere else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from tests.conftest import make_model
from tests.export.counting import flop_of
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA
from trtower.errors import CheckpointError, ConfigError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.graph.cost import measure_graph
from trtower_export.graph.truncate import truncate
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.precision import quantisation
from trtower_export.precision.quantisation import calibrate, read_quantised

KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("precision", KINDS)
def test_eight_bit_bundle_passes_its_own_bounds(
    export: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "b", ExportOptions(precision=precision))
    manifest, certificate = bundle.manifest, bundle.manifest.certificate
    assert certificate.passed, certificate.bounds
    # PyTorch's simulation, with the graph's own scales, is what ONNX Runtime computes.
    assert certificate.bundle.relative_error == pytest.approx(certificate.torch.relative_error, rel=0.2)
    assert certificate.torch.relative_error > 5e-3
    assert (manifest.calibration.layers, manifest.calibration.images) == (18, 12)
    graph = onnx.load(bundle.path / GRAPH, load_external_data=False).graph
    eight = {tensor.name for tensor in graph.initializer if tensor.data_type == KINDS[precision] and tensor.dims}
    for name in (GRAPH, FUSED_GRAPH):
        onnx.checker.check_model(bundle.path / name, full_check=True)
    assert eight == {f"layers.{layer}.{name}.weight_8bit" for layer in range(3) for name in LINEAR}
    plain = Bundle.open(export("clip", flavour="none"))
    assert manifest.files[GRAPH_DATA].size < 0.75 * plain.manifest.files[GRAPH_DATA].size
    assert measure_graph(bundle.path / GRAPH, flop_of(bundle.path / GRAPH)) == manifest.cut == plain.manifest.cut
    fused = onnx.load(bundle.path / FUSED_GRAPH, load_external_data=False).graph
    assert sum(node.op_type == "Attention" for node in fused.node) == 3
    # queries, keys and values read the same tensor, which is quantised once
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 3 * 4


def test_scales_of_weights_are_their_largest_magnitudes_after_smoothing(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    options = ExportOptions(precision="int8", flavour="none", check=False, keep_fp16=("layers.0", "layers.2"))
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "b", options)
    scales = read_quantised(bundle)
    assert set(scales) == {f"layers.1.{name}" for name in LINEAR}
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    tower = truncate(checkpoint.load_model(), checkpoint.family, bundle.manifest.spec)
    for name, found in scales.items():
        weight = tower.get_parameter(f"{name}.weight") / (1 if found.smoothing is None else found.smoothing)
        assert torch.allclose(found.weight * 127, weight.abs().amax(1), rtol=1e-5)


def test_int8_evens_out_channels_that_the_layers_of_one_tensor_share(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    options = ExportOptions(precision="int8", flavour="none", check=False)
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "b", options)
    scales = read_quantised(bundle)
    factors = {name: each.smoothing.tolist() for name, each in scales.items() if each.smoothing is not None}
    assert factors.keys() == scales.keys()
    query, key, value, _, fc1, _ = (factors[f"layers.1.{name}"] for name in LINEAR)
    assert query == key == value != fc1
    assert all(max(each) > 1.5 * min(each) for each in factors.values())


def test_int8_bears_a_channel_that_is_far_larger_than_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("clip")
    mlp = getattr(model, "vision_model", model).encoder.layers[0].mlp
    with torch.no_grad():
        mlp.fc1.weight[5] *= 100
        mlp.fc2.weight[:, 5] /= 100
    model.save_pretrained(tmp_path / "outlier")
    smoothed = export_tower(str(tmp_path / "outlier"), tmp_path / "smoothed", ExportOptions(precision="int8"))
    monkeypatch.setitem(quantisation.FORMATS, "int8", replace(quantisation.FORMATS["int8"], smoothing=None))
    plain = export_tower(str(tmp_path / "outlier"), tmp_path / "plain", ExportOptions(precision="int8"))
    assert all(each.smoothing is None for each in read_quantised(plain).values())
    for figures in ("bundle", "torch"):
        errors = [getattr(each.manifest.certificate, figures).relative_error for each in (smoothed, plain)]
        assert errors[0] < errors[1] / 2


def test_channel_that_is_idle_in_calibration_is_smoothed_within_a_limit() -> None:
    """It may be large in another image."""

    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 3)])
            nn.init.ones_(self.get_parameter("layers.0.weight"))

        def forward(self, numbers: Tensor) -> Tensor:
            result: Tensor = self.layers[0](numbers)
            return result

    (scales,) = calibrate(OneLayer(), "int8", [torch.tensor([[[0.0, 1.0, -1.0, 1.0]]])], []).values()
    assert scales.smoothing is not None
    assert scales.smoothing.tolist() == pytest.approx([1000**0.5, 1, 1, 1])
    assert scales.input == pytest.approx(1 / 127)


def test_pattern_that_names_no_linear_layer_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Everything else is in FP16 anyway, so it is a mistake."""
    options = ExportOptions(
        precision="int8", flavour="none", check=False, keep_fp16=("layers.*.mlp", "layers.1.layer_norm1")
    )
    with pytest.raises(
        ConfigError, match=r"'layers\.1\.layer_norm1' matches no linear layer, .* such as layers\.2\.mlp\.fc2"
    ):
        export_tower(str(checkpoints["clip"]), tmp_path / "b", options)


def test_fp8_is_built_for_gpus_that_have_it_and_refused_for_others(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    options = ExportOptions(precision="fp8", check=False)
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "b", options)
    assert min(map(float, bundle.manifest.plans[0].compute_capabilities)) == 8.9
    with pytest.raises(ConfigError, match=r"fp8 needs compute capability 8\.9 or later, .* for 8\.6"):
        export_tower(
            str(checkpoints["clip"]), tmp_path / "c", ExportOptions(precision="fp8", compute_capabilities=("8.6",))
        )


@pytest.mark.parametrize("precision", KINDS)
def test_output_whose_weights_are_all_zero_stays_zero(tmp_path: Path, precision: str) -> None:
    """Pruned checkpoints have such rows. TensorRT would refuse a step of zero, and PyTorch would give NaN."""
    model = make_model("clip")
    layer = getattr(model, "vision_model", model).encoder.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight[3] = 0
        layer.mlp.fc1.weight.zero_()
    model.save_pretrained(tmp_path / "pruned")
    bundle = export_tower(str(tmp_path / "pruned"), tmp_path / "b", ExportOptions(precision=precision))
    certificate = bundle.manifest.certificate
    assert certificate.passed, certificate.bounds
    assert certificate.torch.relative_error > 5e-3
    assert all((scales.weight > 0).all() for scales in read_quantised(bundle).values())


def test_layer_whose_input_is_not_finite_is_named(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    spec = checkpoint.spec(-2, "patch", None)
    tower = truncate(checkpoint.load_model(), checkpoint.family, spec)
    image = torch.zeros(1, 3, spec.image_size, spec.image_size)
    image[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"input of layers\.0\.self_attn\.q_proj is not finite"):
        calibrate(tower, "int8", [torch.zeros_like(image), image], [])
