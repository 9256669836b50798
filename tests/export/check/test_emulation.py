"""The emulation rounds everything that an FP16 kernel may round, and nothing that the graph has in FP32.

The checkpoints are built so that PyTorch in FP16 and ONNX Runtime compute them well, or compute the sums exactly.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from tests.conftest import BATCH
from tests.export.checking import Wrapped, check
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH
from trtower.errors import BundleError, ConfigError
from trtower.spec import PRECISIONS
from trtower_export.check import certify
from trtower_export.check.emulation import EMULATED, EmulatedRunner, emulate, read_emulated
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.graph.onnx_graph import read_onnx
from trtower_export.pipeline import ExportOptions, export_tower

LARGE = 64.0
"""Hidden states of this size: their squares sum to 64 x 64**2 = 262144 or more. A power of two loses nothing else."""

HUGE = 200.0
"""Queries and keys of this size: all scores are 200 x 200 x 16 / 4 = 160000, so their softmax is exact."""

Change = Callable[[Any], None]


def enlarge_states(vision: Any) -> None:
    """Make every hidden state LARGE times as large; the norms undo it."""
    scaled = [vision.pre_layrnorm]
    for layer in vision.encoder.layers:
        scaled += [layer.self_attn.out_proj, layer.mlp.fc2]
    for module in scaled:
        module.weight.mul_(LARGE)
        module.bias.mul_(LARGE)


def enlarge_scores(vision: Any) -> None:
    """Make one layer attend to all tokens equally, with huge scores."""
    attention = vision.encoder.layers[1].self_attn
    for module in (attention.q_proj, attention.k_proj):
        module.weight.zero_()
        module.bias.fill_(HUGE)


@pytest.fixture
def changed(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[Change], Path]:
    def get(change: Change) -> Path:
        folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "changed"))
        model = open_checkpoint(str(folder)).load_model()
        with torch.no_grad():
            change(getattr(model, "vision_model", model))
        model.save_pretrained(folder)
        return folder

    return get


def export_changed(checkpoint: Path, out: Path, *keep_fp32: str) -> Path:
    options = ExportOptions(flavour="none", check=False, profiles=(BATCH,), keep_fp32=keep_fp32)
    return export_tower(str(checkpoint), out, options).path


def test_layer_norm_whose_squares_overflow_fails_only_in_emulation(
    changed: Callable[[Change], Path], tmp_path: Path
) -> None:
    checkpoint = changed(enlarge_states)
    bundle = export_changed(checkpoint, tmp_path / "b")
    assert check(bundle, checkpoint, quick=True).passed
    emulated = check(bundle, checkpoint, quick=True, backend="emulated-fp16", by_layer=True)
    assert not emulated.passed
    assert emulated.layers[0].bundle.relative_error < 1e-3 < 0.1 < emulated.layers[1].bundle.relative_error


def test_attention_scores_beyond_fp16_fail_in_emulation(changed: Callable[[Change], Path], tmp_path: Path) -> None:
    checkpoint = changed(enlarge_scores)
    bundle = export_changed(checkpoint, tmp_path / "b")
    emulated = check(bundle, checkpoint, quick=True, backend="emulated-fp16", by_layer=True)
    assert not emulated.passed
    assert emulated.bundle.non_finite == 2 * 10 * 64
    assert emulated.torch.non_finite == 0
    assert [layer.bundle.non_finite > 0 for layer in emulated.layers] == [False, False, True, True]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (enlarge_states, ("layers.*.layer_norm1", "layers.*.layer_norm2")),
        (enlarge_scores, ("layers.1.self_attn.scores",)),
    ],
)
def test_what_is_kept_in_fp32_is_not_rounded(
    changed: Callable[[Change], Path], tmp_path: Path, change: Change, kept: tuple[str, ...]
) -> None:
    checkpoint = changed(change)
    bundle = export_changed(checkpoint, tmp_path / "b", *kept)
    emulated = check(bundle, checkpoint, quick=True, backend="emulated-fp16")
    assert emulated.passed, emulated.bounds
    # everything else is still rounded, once more often than in PyTorch
    assert 0.8 < emulated.bundle.relative_error / emulated.torch.relative_error < 1.5


def test_emulation_of_fp16_rounds_after_every_operation(
    export: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    bundle = export("clip", flavour="none")
    certificate = check(bundle, checkpoints["clip"], quick=True, backend="emulated-fp16")
    assert certificate.passed
    assert certificate.runner == f"onnxruntime {onnxruntime.__version__}, CPU, FP16 emulated"
    assert (certificate.ran, certificate.gpu) == ("graph", None)
    assert 0.8 < certificate.bundle.relative_error / certificate.torch.relative_error < 1.5


@pytest.mark.parametrize(("backend", "precision"), [("emulated-fp16", "fp32"), ("emulated-bf16", "fp16")])
def test_emulation_of_the_wrong_precision_is_refused(
    export: Callable[..., Path], checkpoints: dict[str, Path], backend: str, precision: str
) -> None:
    bundle = export("clip", precision=precision, flavour="none")
    with pytest.raises(
        ConfigError, match=f"--backend {backend} is for {EMULATED[backend]} bundles, but .* is {precision}"
    ):
        check(bundle, checkpoints["clip"], quick=True, backend=backend)


def test_emulation_is_never_chosen_if_there_are_kernels(
    export: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    assert "emulated" not in check(export("clip", flavour="none"), checkpoints["clip"], quick=True).backend


def test_weights_are_verified_before_they_are_emulated(spoilt: Path, checkpoints: dict[str, Path]) -> None:
    data = (spoilt / f"{GRAPH}.data").read_bytes()
    (spoilt / f"{GRAPH}.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"tower\.onnx\.data was altered"):
        EmulatedRunner(Bundle.open(spoilt), worst=True)


def test_graph_without_half_precision_is_left_as_it_is(export: Callable[..., Path]) -> None:
    bundle = Bundle.open(export("clip", precision="fp32", flavour="none"))
    before, after = read_onnx(bundle).graph, read_onnx(bundle)
    emulate(after, TensorProto.FLOAT16, worst=True)
    for field in ("node", "initializer", "input", "output"):
        assert list(getattr(after.graph, field)) == list(getattr(before, field)), field


def parse(body: str, inputs: str, outputs: str = "float16[n, m] y") -> onnx.ModelProto:
    text = f'<ir_version: 11, opset_import: ["": 23]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    for index, node in enumerate(model.graph.node):
        node.name = f"node-{index}"
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def run(model: onnx.ModelProto, **inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, inputs)
    return np.asarray(output)


def emulated(model: onnx.ModelProto, half: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    emulate(model, half, worst=True)
    onnx.checker.check_model(model)
    return model


def test_results_in_half_precision_are_rounded_and_those_in_fp32_are_not() -> None:
    x = np.array([[1.0, 60000.0]], np.float32)
    twice = run(
        emulated(parse("z = Add (x, x) y = Mul (z, half)", "float16[n, m] x, float16[1] half")),
        x=x,
        half=np.array([0.5], np.float32),
    )
    assert twice.tolist() == [[1.0, np.inf]]
    body = "w = Cast <to = 1> (x) z = Add (w, w) v = Mul (z, half) y = Cast <to = 10> (v)"
    model = emulated(parse(body, "float16[n, m] x, float[1] half"))
    assert run(model, x=x, half=np.array([0.5], np.float32)).tolist() == [[1.0, 60000.0]]
    third = run(model, x=np.array([[1.0, 2.0]], np.float32), half=np.array([1 / 3], np.float32))
    assert third.tolist() == [[float(np.float16(2 / 3)), float(np.float16(4 / 3))]]


@pytest.mark.parametrize(
    ("size", "precision", "fits"), [(10.0, "fp16", True), (20.0, "fp16", False), (20.0, "bf16", True)]
)
def test_layer_norm_sums_its_squares_in_the_half_precision_of_the_graph(
    size: float, precision: str, fits: bool
) -> None:
    """The squares of 256 numbers +-10 sum to 25600, those of +-20 to 102400, which is infinite in FP16."""
    half = PRECISIONS[precision].onnx
    word = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    inputs = f"{word}[n, m] x, {word}[m] one, {word}[m] bias"
    model = emulated(parse("y = LayerNormalization (x, one, bias)", inputs, f"{word}[n, m] y"), half)
    row = np.tile(np.array([size, -size], np.float32), (1, 128))
    output = run(model, x=row, one=np.ones(256, np.float32), bias=np.full(256, 0.5, np.float32))
    assert output.tolist() == [[1.5, -0.5] * 128 if fits else [0.5] * 256]


@pytest.mark.parametrize(("mean", "fits"), [(200.0, True), (300.0, False)])
def test_layer_norm_sums_its_numbers_in_half_precision(mean: float, fits: bool) -> None:
    """256 numbers of 300 sum to 76800, which is infinite in FP16; their squared deviations are small."""
    inputs = "float16[n, m] x, float16[m] one, float16[m] bias"
    model = emulated(parse("y = LayerNormalization (x, one, bias)", inputs, "float16[n, m] y"), TensorProto.FLOAT16)
    row = np.tile(np.array([mean + 1, mean - 1], np.float32), (1, 128))
    output = run(model, x=row, one=np.ones(256, np.float32), bias=np.zeros(256, np.float32))
    assert np.isfinite(output).all() == fits


def test_attention_is_spelled_out_with_its_own_scale() -> None:
    shape = "float16[b, 2, t, 8]"
    model = parse("y = Attention <scale = 0.25> (q, k, v)", f"{shape} q, {shape} k, {shape} v", f"{shape} y")
    kinds = [node.op_type for node in emulated(model).graph.node]
    assert "Attention" not in kinds
    assert kinds.count("MatMul") == 2
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8)).astype(np.float16).astype(np.float32)
    query, key, value = map(torch.from_numpy, (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.25)
    assert np.abs(run(model, q=q, k=k, v=v) - expected.numpy()).max() < 2e-3  # a few roundings of numbers of about 1


def test_by_layer_emulates_a_bf16_graph_that_ran_on_a_gpu(
    export: Callable[..., Path], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan returns no hidden states, so the graph runs on the CPU, which has no BF16 kernels."""
    bundle = export("clip", precision="bf16", flavour="none")
    plan = Wrapped(EmulatedRunner(Bundle.open(bundle), worst=True), lambda *_: None)
    monkeypatch.setattr(certify, "_open", lambda *_: plan)
    certificate = check(bundle, checkpoints["clip"], photographs=1, quick=True, by_layer=True)
    assert [layer.layer for layer in certificate.layers] == [0, 1, 2, 3]


def test_bf16_is_rounded_only_at_results_because_it_does_not_overflow(export: Callable[..., Path]) -> None:
    def kinds(precision: str) -> set[str]:
        bundle = Bundle.open(export("clip", precision=precision, flavour="none"))
        return {node.op_type for node in read_emulated(bundle).graph.node}

    assert {"Attention", "LayerNormalization"} <= kinds("bf16")
    assert kinds("fp16").isdisjoint({"Attention", "LayerNormalization"})
