"""Towers with planted faults: plain FP16 fails, the doctor names the operation, and `auto` keeps only that one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import BATCH, make_model
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH, GRAPH_DATA
from trtower.cli import run
from trtower.errors import BuildError, ConfigError
from trtower.inspection import as_text, inspect_bundle
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.certify import check_bundle
from trtower_export.check.photographs import load_photographs, prepare
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.preprocessor import fit_preprocessor
from trtower_export.console import LoggedProgress
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.plan.build import add_plan
from trtower_export.precision.doctor import examine

LAYER = 1
pytestmark = pytest.mark.usefixtures("one_thread")


def scale_the_projection(model: nn.Module) -> str:
    """Multiply a product by a power of two, which the layer scale after it divides out: exact in FP32."""
    layer = model.encoder.layer[LAYER]
    attention = layer.attention
    projection = attention.o_proj if hasattr(attention, "o_proj") else attention.output.dense
    projection.weight.mul_(2.0**18)
    projection.bias.mul_(2.0**18)
    layer.layer_scale1.lambda1.div_(2.0**18)
    return f"layers.{LAYER}.attention.{'o_proj' if hasattr(attention, 'o_proj') else 'output.dense'}"


def scale_the_mlp(model: nn.Module) -> str:
    """Do the same so that the product overflows and the weights do not: kernels that compute in FP32 hide it."""
    layer = model.encoder.layer[LAYER]
    layer.mlp.fc2.weight.mul_(2.0**15)
    layer.mlp.fc2.bias.mul_(2.0**15)
    layer.layer_scale2.lambda1.div_(2.0**15)
    return f"layers.{LAYER}.mlp.fc2"


def drive_a_unit_off(model: nn.Module) -> str:
    """Set one unit of an MLP to -90000, where its activation is 0."""
    layer = getattr(model, "vision_model", model).encoder.layers[LAYER]
    layer.mlp.fc1.weight[0].mul_(0)
    layer.mlp.fc1.weight[0, 0] = 9e4
    layer.layer_norm2.weight[0] = 0.0
    layer.layer_norm2.bias[0] = -1.0
    return f"layers.{LAYER}.mlp.fc1"


FAULTS: dict[str, tuple[str, Callable[[nn.Module], str]]] = {
    "scaled projection": ("dinov2", scale_the_projection),
    "scaled product": ("dinov2", scale_the_mlp),
    "dead unit": ("clip-gelu", drive_a_unit_off),
}


def plant(fault: str, folder: Path, **config: object) -> tuple[str, str]:
    family, change = FAULTS[fault]
    model = make_model(family, **config)
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        name = change(model)
        if fault.startswith("scaled"):
            assert torch.equal(model(pixels).last_hidden_state, before)
    model.save_pretrained(folder)
    return str(folder), name


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found_named_and_mended(fault: str, tmp_path: Path) -> None:
    checkpoint, name = plant(fault, tmp_path / "hot")
    plain = export_tower(checkpoint, tmp_path / "plain", ExportOptions(profiles=(BATCH,), flavour="none"))
    assert not plain.manifest.certificate.passed

    opened = open_checkpoint(checkpoint)
    spec = opened.spec()
    processor = ImageProcessor(fit_preprocessor(opened, spec.image_size, LoggedProgress()))
    images = dict(zip("ab", prepare(load_photographs(None, limit=2).images, processor), strict=True))
    found = examine(opened, spec, images, LoggedProgress())
    assert [each.name for each in found.operations if each.overflow] == [name]
    assert [each.name for each in found.operations if each.error["fp16"] is None] == [name]

    mended = export_tower(checkpoint, tmp_path / "auto", ExportOptions(profiles=(BATCH,), precision="auto"))
    assert mended.manifest.keep_fp32 == (name,)
    assert mended.manifest.precision == "fp16"
    certificate = mended.manifest.certificate
    assert certificate.passed
    assert certificate.torch.relative_error is None  # PyTorch's own FP16 overflows
    assert mended.manifest.plans
    assert f"fp16, in FP32 {name}" in as_text(inspect_bundle(mended))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_island_adds_less_than_two_percent_to_graph_and_plans_of_a_deep_tower(fault: str, tmp_path: Path) -> None:
    """FP32 doubles the weights of one operation, at most a third of its layer, and adds its kernels.

    The kernels took up to 0.7 MB, with the weights 3 % of a tower 256 wide. This one is 640 wide, so they hardly count.
    """
    wide = {"mlp_ratio": 4} if FAULTS[fault][0] == "dinov2" else {"intermediate_size": 2560}
    size = {"num_hidden_layers": 24, "hidden_size": 640, "num_attention_heads": 10}
    checkpoint, name = plant(fault, tmp_path / "hot", **size, **wide)
    sizes: list[list[int]] = []
    for keep in ((), (name,)):
        options = ExportOptions(profiles=(BATCH,), flavour="none", check=False, keep_fp32=keep, overwrite=True)
        bundle = export_tower(checkpoint, tmp_path / "b", options)
        for targets in ((), ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")):
            add_plan(Bundle.open(bundle.path), "tensorrt-rtx", targets, LoggedProgress())
        files = Bundle.open(bundle.path).manifest.files
        plans = [entry.size for name, entry in sorted(files.items()) if name.endswith(".plan")]
        assert len(plans) == 2
        sizes.append([files[GRAPH].size + files[GRAPH_DATA].size, *plans])
    grown = [kept / plain for plain, kept in zip(*sizes, strict=True)]
    assert min(grown) > 1.0
    assert max(grown) < 1.02


def test_overflow_that_kernels_for_the_cpu_hide_fails_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, _ = plant("scaled product", tmp_path / "hot")
    options = ["--out", str(tmp_path / "plain"), "--flavour", "none"]
    assert run(["export", checkpoint, *options]) == 1
    certificate = Bundle.open(tmp_path / "plain").manifest.certificate
    assert certificate.bundle.non_finite == 0
    assert certificate.as_typed.non_finite > 0
    assert {bound.figure for bound in certificate.bounds if not bound.holds} >= {"non_finite", "token_cosine_min"}
    assert "PyTorch in the same precision is not finite either" in capsys.readouterr().out


def test_norm_whose_squares_overflow_is_kept_for_kernels_that_sum_in_half_precision(tmp_path: Path) -> None:
    model = make_model("clip")
    layers = getattr(model, "vision_model", model).encoder.layers
    with torch.no_grad():  # one channel of the residual stream is 257 for a layer, and its norms ignore it
        layers[LAYER].mlp.fc2.bias[5] = 257.0
        layers[LAYER + 1].mlp.fc2.bias[5] = -257.0
        layers[LAYER + 1].layer_norm1.weight[5] = layers[LAYER + 1].layer_norm1.bias[5] = 0.0
        layers[LAYER + 1].layer_norm2.weight[5] = layers[LAYER + 1].layer_norm2.bias[5] = 0.0
    model.save_pretrained(tmp_path / "hot")
    checkpoint, photographs = open_checkpoint(str(tmp_path / "hot")), load_photographs(None, limit=1)

    def passes(precision: str, backend: str) -> tuple[Bundle, bool]:
        options = ExportOptions(precision=precision, flavour="none", check=False)
        bundle = export_tower(str(tmp_path / "hot"), tmp_path / precision, options)
        checked = check_bundle(bundle, checkpoint, photographs, LoggedProgress(), backend=backend, quick=True)
        return checked, checked.manifest.certificate.passed

    assert passes("fp16", "emulated-fp16")[1] is False
    bundle, passed = passes("auto", "emulated-fp16")
    assert passed
    norms = {f"layers.{LAYER + 1}.layer_norm1", f"layers.{LAYER + 1}.layer_norm2"}
    kept = set(bundle.manifest.keep_fp32)
    assert kept & norms
    assert kept <= norms | {f"layers.{LAYER + 1}.mlp.fc2"}  # it subtracts the 257 again, and rounds there


def test_sound_tower_keeps_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = ExportOptions(precision="auto", flavour="none", check=False)
    assert export_tower(str(checkpoints["clip"]), tmp_path / "b", options).manifest.keep_fp32 == ()


def test_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = make_model("clip")
    with torch.no_grad():
        getattr(model, "vision_model", model).encoder.layers[2].mlp.fc2.bias[5] = 1e5
    model.save_pretrained(tmp_path / "hot")
    with pytest.raises(BuildError, match=r"too large for FP16\. Export with --precision bf16"):
        export_tower(str(tmp_path / "hot"), tmp_path / "b", ExportOptions(precision="auto", flavour="none"))
    assert not (tmp_path / "b").exists()


def test_operations_are_kept_by_hand_in_the_order_in_which_they_run(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    sizes = {}
    for keep in ((), ("layers.*.layer_norm1", "stem.1")):
        options = ExportOptions(keep_fp32=keep, flavour="none", check=False, overwrite=True)
        bundle = export_tower(str(checkpoints["clip"]), tmp_path / "b", options)
        sizes[keep] = bundle.manifest.files[GRAPH].size + bundle.manifest.files[GRAPH_DATA].size
    norms = tuple(f"layers.{layer}.layer_norm1" for layer in range(3))
    assert bundle.manifest.keep_fp32 == ("stem.1", *norms)
    plain, kept = sizes.values()
    assert 1.0 < kept / plain < 1.02


def test_fp32_has_nothing_to_keep() -> None:
    with pytest.raises(ConfigError, match="--keep-fp32 is for half precision"):
        ExportOptions(precision="fp32", keep_fp32=("stem",))
    with pytest.raises(ConfigError, match="--keep-fp16 needs --precision fp8 or int8; the precision is fp16"):
        ExportOptions(keep_fp16=("layers.*.mlp.fc2",))
