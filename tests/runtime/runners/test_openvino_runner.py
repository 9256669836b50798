"""OpenVINO computes what the graph says, in FP32 or BF16, directly on the caller's tensors."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.export.checking import make_hashes_fit
from tests.runtime.runners.test_torch_runner import expect
from trtower import Bundle, VisionTower
from trtower.bundle.manifest import GRAPH, GRAPH_DATA
from trtower.bundle.staging import describe, write_manifest
from trtower.errors import BackendError, BundleError
from trtower.runners import openvino as runner_module
from trtower.runners import processor
from trtower.runners.choose import candidates, choose
from trtower.runners.openvino import OpenVinoRunner, has_bf16
from trtower.runners.processor import has_vnni
from trtower_export.check.emulation import EmulatedRunner
from trtower_export.checkpoint.checkpoint import open_checkpoint

openvino = pytest.importorskip("openvino")

FP32_ERROR = 1e-5
"""Relative difference of two orders of summing in FP32 through four layers (4e-7 was measured)."""

FP16_ERROR = 2e-3
"""Relative: both sides have FP16 weights, and one rounds results to FP16 (7e-4 was measured)."""

BF16_ERROR = 3e-2
"""Relative: rounding to BF16 in two places (9e-3 was measured). A tower that is one layer off errs by more than 0.3."""

INT8_ERROR = 1.3
"""How much larger the error may be than that of the simulated 8 bits: OpenVINO rounds elsewhere (1.04 was measured)."""

EIGHT_BIT_ERROR = 1e-3
"""Relative difference of two orders of summing in FP32, which may turn a rounding to 8 bits (2e-5 was measured)."""

with_vnni = pytest.mark.skipif(not has_vnni(), reason="this processor has no VNNI")
with_bf16 = pytest.mark.skipif(not has_bf16(openvino), reason="this processor has no BF16 support")


def draw(tower: VisionTower, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tower.image_size, tower.image_size, generator=generator)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", ["openvino", pytest.param("openvino-bf16", marks=with_bf16)])
@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_features_match_pytorch(
    export: Callable[..., Path], checkpoints: dict[str, Path], family: str, precision: str, backend: str
) -> None:
    tower = VisionTower.load(export(family, precision=precision, flavour="none"), backend)
    images = draw(tower)
    expected = expect(checkpoints[family], tower, images)
    coarsest = BF16_ERROR if "bf16" in (precision, backend.removeprefix("openvino-")) else FP16_ERROR
    assert error(tower(images), expected) <= (FP32_ERROR if (precision, backend) == ("fp32", "openvino") else coarsest)
    assert tower.backend.endswith(", CPU, BF16" if "bf16" in backend else ", CPU, FP32")


@with_vnni
def test_8_bits_have_the_error_that_the_graph_has_elsewhere(
    export: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    bundle = export("clip", precision="int8", flavour="none")
    tower, simulated = (VisionTower.load(bundle, backend) for backend in ("openvino-int8", "openvino"))
    images = draw(tower, 4)
    expected = expect(checkpoints["clip"], tower, images)
    assert error(tower(images), expected) <= INT8_ERROR * error(simulated(images), expected)
    assert not torch.equal(tower(images), simulated(images))
    assert tower.backend.endswith(", CPU, INT8")
    one_by_one = torch.cat([tower(image[None]) for image in images])
    assert error(tower(images), one_by_one) <= BF16_ERROR


def test_inputs_in_8_bits_are_not_rounded_again_in_fp32(export: Callable[..., Path]) -> None:
    """OpenVINO would do so where it sees weights in INT8, and err by 2e-2."""
    bundle = export("clip", precision="int8", flavour="none")
    tower, exact = (VisionTower.load(bundle, backend) for backend in ("openvino", "torch-cpu"))
    images = draw(tower, 4)
    assert error(tower(images), exact(images)) <= EIGHT_BIT_ERROR


@with_vnni
def test_products_of_8_bits_are_computed_in_8_bits(export: Callable[..., Path], clip_bundle: Path) -> None:
    """Query, key, value, the output of attention and both layers of the MLP, in each of three layers."""
    kinds = {}
    for backend in (runner_module.INT8, runner_module.BF16):
        runner = OpenVinoRunner(Bundle.open(export("clip", precision="int8", flavour="none")), backend)
        nodes = [node.get_rt_info() for node in runner._compiled.get_runtime_model().get_ops()]
        layers = [each for each in nodes if "FullyConnected" in str(each["layerType"].value)]
        kinds[backend.name] = sum("i8" in str(each["primitiveType"].value) for each in layers)
    assert kinds == {"openvino-int8": 18, "openvino-bf16": 0}


def test_8_bits_are_for_int8_bundles_and_processors_with_vnni(
    export: Callable[..., Path], clip_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "has_vnni", lambda: True)
    for precision in ("fp8", "fp16"):
        with pytest.raises(BackendError, match=f"this one is in {precision}: export with --precision int8"):
            VisionTower.load(export("clip", precision=precision, flavour="none"), "openvino-int8")
    bundle = export("clip", precision="int8", flavour="none")
    (candidate,) = candidates(Bundle.open(bundle), backend="openvino-int8")
    assert candidate.reservation == (
        "OpenVINO chooses by itself where it rounds to 8 bits, and the bundle has no valid certificate of a check "
        f"on it: trtower check {bundle} --backend openvino-int8"
    )
    assert choose(Bundle.open(bundle)).backend == "openvino"
    monkeypatch.setattr(runner_module, "has_vnni", lambda: False)
    with pytest.raises(BackendError, match=r"this processor has no VNNI, without which .* use backend openvino"):
        VisionTower.load(bundle, "openvino-int8")


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("fma avx512_vnni", True),
        ("avx2 avx_vnni", True),
        ("amx_int8", True),
        ("avx2 avx512_bf16", False),
        (None, False),
    ],
)
def test_vnni_is_read_from_the_processors_flags(monkeypatch: pytest.MonkeyPatch, flags: str | None, has: bool) -> None:
    monkeypatch.setattr(processor, "processor_fields", lambda: {"flags": flags} if flags else {})
    assert has_vnni() is has


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_results_of_a_half_precision_graph_are_not_rounded_on_the_way(
    export: Callable[..., Path], precision: str, checkpoints: dict[str, Path]
) -> None:
    """The result is closer to FP32 PyTorch than that of the graph as typed, although both have rounded weights."""
    bundle = Bundle.open(export("clip", precision=precision, flavour="none"))
    chosen, typed = choose(bundle, "openvino"), EmulatedRunner(bundle, worst=False)
    checkpoint, spec = open_checkpoint(str(checkpoints["clip"])), bundle.manifest.spec
    images = torch.randn(2, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = checkpoint.family.read_states(checkpoint.load_model(spec), images)[spec.layers[0]]
    errors = []
    for runner in (chosen, typed):
        features = torch.empty(2, spec.num_tokens, spec.hidden_size, dtype=runner.dtype)
        runner.run(images.to(runner.dtype), features)
        errors.append(error(features, expected))
    assert errors[0] < 0.9 * errors[1], errors


@with_bf16
def test_bf16_keeps_the_weights_of_a_bf16_graph_as_they_are(
    export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP32 weights would take twice the memory."""
    widened = []
    widen = runner_module._widen
    monkeypatch.setattr(
        runner_module, "_widen", lambda *args, **rest: widened.append(widen(*args, **rest)) or widened[-1]
    )
    bundle = Bundle.open(export("clip", precision="bf16", flavour="none"))
    for backend in (runner_module.FP32, runner_module.BF16):
        OpenVinoRunner(bundle, backend)
    kinds = [
        {
            source.get_element_type().get_type_name()
            for node in model.get_ops()
            if node.get_type_name() in runner_module.PRODUCTS
            for source in (node.input_value(1).get_node(),)
            if source.get_type_name() == "Constant"
        }
        for model in widened
    ]
    assert kinds == [set(), {"bf16"}]  # in FP32 there is a conversion in between


@with_bf16
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_products_that_stay_in_fp32_run_in_bf16_too(
    export: Callable[..., Path], checkpoints: dict[str, Path], precision: str
) -> None:
    kept = () if precision == "fp32" else ("layers.0.self_attn.*_proj", "layers.1.mlp.fc1", "stem.*")
    tower = VisionTower.load(export("clip", precision=precision, keep_fp32=kept, flavour="none"), "openvino-bf16")
    images = draw(tower)
    assert error(tower(images), expect(checkpoints["clip"], tower, images)) <= BF16_ERROR


@with_bf16
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_8_bits_run_in_bf16_too(export: Callable[..., Path], checkpoints: dict[str, Path], precision: str) -> None:
    bundle = export("clip", precision=precision, flavour="none")
    tower, other = VisionTower.load(bundle, "openvino-bf16"), VisionTower.load(bundle, "openvino")
    images = draw(tower, 4)
    expected = expect(checkpoints["clip"], tower, images)
    assert error(tower(images), expected) <= INT8_ERROR * error(other(images), expected)


@with_bf16
def test_bf16_rounds_the_weights_of_an_fp16_graph_without_fp32_ones(
    clip_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widened = []
    widen = runner_module._widen
    monkeypatch.setattr(runner_module, "_widen", lambda *args: widened.append(widen(*args)) or widened[-1])
    OpenVinoRunner(Bundle.open(clip_bundle), runner_module.BF16)
    types = {
        node.input_value(1).get_element_type().get_type_name()
        for node in widened[0].get_ops()
        if node.get_type_name() in runner_module.PRODUCTS
        and node.input_value(1).get_node().get_type_name() == "Constant"
    }
    assert types == {"bf16"}


def test_every_batch_of_the_profile_runs_on_the_callers_tensors(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle, "openvino")
    images = draw(tower, 9).half()
    one_by_one = torch.cat([tower(image[None]) for image in images])
    assert error(tower(images), one_by_one) <= FP16_ERROR
    runner, spec = tower.runner, tower.spec
    around = torch.full((4, spec.num_tokens, spec.hidden_size), -1.0, dtype=torch.half)
    runner.run(images[:2], around[1:3])
    assert (around[[0, 3]] == -1).all()
    assert error(around[1:3, spec.num_prefix_tokens :], one_by_one[:2]) <= FP16_ERROR


def test_eight_threads_get_the_results_of_one(clip_bundle: Path) -> None:
    tower = VisionTower.load(clip_bundle, "openvino")
    batches = [draw(tower, 1 + seed % 4, seed).half() for seed in range(8)]
    expected = [tower(images) for images in batches]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda index: tower(batches[index % 8]), range(200)))
    assert all(torch.equal(features, expected[index % 8]) for index, features in enumerate(results))


def test_graph_with_other_tensors_than_the_manifest_is_refused(spoilt: Path) -> None:
    import onnx

    model = onnx.load(spoilt / "tower.onnx", load_external_data=False)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "something_else"
    (spoilt / "tower.onnx").write_bytes(model.SerializeToString())
    make_hashes_fit(spoilt, "tower.onnx")
    with pytest.raises(BundleError, match=r"tower\.onnx has \[\('something_else'"):
        VisionTower.load(spoilt, "openvino")


def test_graph_that_openvino_cannot_read_is_an_error_on_one_line(spoilt: Path) -> None:
    (spoilt / "tower.onnx").write_bytes(b"no graph")
    make_hashes_fit(spoilt, "tower.onnx")
    with pytest.raises(BackendError, match=r"openvino .* could not load .*tower\.onnx: .+") as failure:
        VisionTower.load(spoilt, "openvino")
    assert "\n" not in str(failure.value)


def test_bundle_that_is_replaced_while_it_is_loaded_is_refused(
    spoilt: Path, clip_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_it(*_: object) -> None:
        shutil.copy(clip_bundle / "tower.onnx.data", spoilt / "again")
        (spoilt / "again").replace(spoilt / "tower.onnx.data")

    monkeypatch.setattr(runner_module, "check_contract", replace_it)
    with pytest.raises(BundleError, match=r"tower\.onnx\.data was replaced while it was being loaded"):
        VisionTower.load(spoilt, "openvino")


def test_processor_without_bf16_says_so_and_runs_a_bf16_bundle_in_fp32(
    export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtower.runners.openvino.has_bf16", lambda _: False)
    monkeypatch.setattr("trtower.runners.torch.multiplies_bf16", lambda: False)
    bundle = export("clip", precision="bf16", flavour="none")
    with pytest.raises(BackendError, match="no BF16 support in this processor"):
        VisionTower.load(bundle, "openvino-bf16")
    assert VisionTower.load(bundle).backend.endswith("CPU, FP32")


@with_bf16
def test_auto_takes_bf16_for_a_bf16_bundle(export: Callable[..., Path]) -> None:
    bundle = Bundle.open(export("clip", precision="bf16", flavour="none"))
    assert choose(bundle).backend == "openvino-bf16"
    assert not next(each for each in candidates(bundle) if each.backend == "openvino-bf16").coarse


@pytest.mark.parametrize("turned", [False, True])
def test_graph_that_reads_weights_from_elsewhere_is_refused(spoilt: Path, *, turned: bool) -> None:
    """Also if protobuf writes the value before the key, which is as valid."""
    bundle = Bundle.open(spoilt)
    entry, name = b"\n\x08location\x12\x0ftower.onnx.data", b"\x12\x0ftower.onnx.dat2"
    graph = (spoilt / GRAPH).read_bytes()
    assert entry in graph
    elsewhere = name + entry[:10] if turned else entry[:10] + name
    (spoilt / GRAPH).write_bytes(graph.replace(entry, elsewhere, 1))
    shutil.copy(spoilt / GRAPH_DATA, spoilt / "tower.onnx.dat2")
    files = {**bundle.manifest.files, GRAPH: describe(spoilt / GRAPH)}
    write_manifest(spoilt, replace(bundle.manifest, files=files, certificates=()))
    with pytest.raises(BundleError, match=r"reads weights that are not in tower\.onnx\.data, so they cannot be"):
        VisionTower.load(spoilt, "openvino")
