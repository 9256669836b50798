"""The comparison by layer names where a graph goes wrong: the first hidden state whose error jumps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime
import pytest
import torch

from tests.conftest import BATCH, make_model
from tests.export import made_up
from tests.export.checking import check, damage, make_hashes_fit
from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import LayerFigures
from trtower.bundle.manifest import GRAPH, GRAPH_DATA
from trtower.errors import BundleError
from trtower.layer_codes import LAST
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.layers import LayerSums, first_jump
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.graph import reference
from trtower_export.graph.onnx_graph import HIDDEN_STATE
from trtower_export.graph.truncate import TruncatedTower, truncate
from trtower_export.pipeline import ExportOptions, export_tower

if TYPE_CHECKING:
    from trtower_export.check.evidence import ImageEvidence

SMALL = 1e-2
"""The relative error of FP16 and BF16 stays below this in these towers; a wrong row makes 0.1, a swapped layer 0.5."""


@pytest.mark.parametrize(
    ("family", "precision", "select_layer", "layers"),
    [
        ("clip", "fp32", -2, [0, 1, 2, 3]),
        ("clip", "fp16", -2, [0, 1, 2, 3]),
        ("clip", "bf16", -2, [0, 1, 2, 3]),
        ("clip", "fp16", -4, [0, 1]),
        ("dinov2", "fp16", (-2, 0, 1), [0, 1, 2, 3]),
        ("dinov2", "bf16", -2, [0, 1, 2, 3]),
    ],
)
def test_sound_graph_jumps_nowhere(
    export: Callable[..., Path],
    checkpoints: dict[str, Path],
    family: str,
    precision: str,
    select_layer: int | tuple[int, ...],
    layers: list[int],
) -> None:
    bundle = export(family, precision=precision, select_layer=select_layer, flavour="none")
    certificate = check(bundle, checkpoints[family], quick=True, by_layer=True)
    assert [layer.layer for layer in certificate.layers] == layers
    assert first_jump(certificate.layers) is None
    assert all(0 < layer.bundle.relative_error < SMALL for layer in certificate.layers)
    assert all((layer.torch.relative_error == 0) == (precision == "fp32") for layer in certificate.layers)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["siglip2", "dinov3_vit", "eva_clip"])
def test_every_state_is_found_in_a_graph_of_another_kind(name: str, tmp_path: Path) -> None:
    """tests/export/graph/test_second_reading.py finds them in every kind."""
    make_model(name).save_pretrained(tmp_path / "checkpoint")
    options = ExportOptions(
        select_layer=(-2, LAST), select_feature="cls_patch", profiles=(BATCH,), flavour="none", check=False
    )
    bundle = export_tower(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    certificate = check(bundle.path, tmp_path / "checkpoint", photographs=1, quick=True, by_layer=True)
    assert [layer.layer for layer in certificate.layers] == [0, 1, 2, 3, 4]
    assert all(layer.bundle.relative_error < SMALL for layer in certificate.layers)


@pytest.mark.parametrize("family", ["dinov2", "clip"])  # with and without a norm after the last layer
def test_last_hidden_state_is_compared_after_the_last_layer(
    export: Callable[..., Path], checkpoints: dict[str, Path], family: str
) -> None:
    bundle = export(family, select_layer=LAST, flavour="none")
    certificate = check(bundle, checkpoints[family], quick=True, by_layer=True)
    assert [layer.layer for layer in certificate.layers] == [0, 1, 2, 3, *([4] if family == "dinov2" else []), 5]
    assert first_jump(certificate.layers) is None
    assert all(layer.torch.relative_error < SMALL for layer in certificate.layers)


def test_no_layer_is_compared_without_by_layer(fp32_bundle: Path, checkpoints: dict[str, Path]) -> None:
    assert check(fp32_bundle, checkpoints["clip"], photographs=1, quick=True).layers == ()


def states_of_graph(bundle: Path, layer: int) -> list[torch.Tensor]:
    """Return one hidden state of the first two photographs, as ONNX Runtime computes it."""
    model = onnx.load(bundle / GRAPH)
    model.graph.output.append(onnx.ValueInfoProto(name=f"{HIDDEN_STATE}{layer}"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(session.run([f"{HIDDEN_STATE}{layer}"], {"pixel_values": pixels.half().numpy()})[0][0]).float()
        for pixels in pixel_values(bundle)
    ]


def pixel_values(bundle: Path) -> list[torch.Tensor]:
    processor = ImageProcessor.from_file(bundle / "preprocessor_config.json")
    photographs = load_photographs(None, limit=2).images
    return [processor.preprocess(each.image, return_tensors="pt")["pixel_values"] for each in photographs]


@torch.no_grad()
def states_of_transformers(checkpoint: Path, bundle: Path, layer: int) -> list[torch.Tensor]:
    opened = open_checkpoint(str(checkpoint))
    model = opened.load_model()
    return [opened.family.read_states(model, pixels)[layer][0] for pixels in pixel_values(bundle)]


def worst_of(states: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> tuple[str, int]:
    """Find the photograph and the token with the largest relative error."""
    errors = torch.stack([(x - ref).norm(dim=-1) / ref.norm(dim=-1) for x, ref in zip(states, reference, strict=True)])
    image, token = divmod(int(errors.argmax()), errors.shape[1])
    return ("astronaut.png", "chelsea.png")[image], token


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("part", ["mlp.fc1", "self_attn.out_proj"])
def test_layer_with_a_damaged_weight_is_named_with_its_worst_image_and_token(
    spoilt: Path, checkpoints: dict[str, Path], damaged: int, part: str
) -> None:
    damage(spoilt, f"layers.{damaged}.{part}/MatMul")
    certificate = check(spoilt, checkpoints["clip"], quick=True, by_layer=True)
    jump = first_jump(certificate.layers)
    assert jump is not None
    assert jump.layer == damaged + 1
    assert jump.torch.relative_error < SMALL < jump.bundle.relative_error
    assert all(layer.bundle.relative_error < SMALL for layer in certificate.layers[: damaged + 1])
    states = states_of_graph(spoilt, jump.layer)
    reference = states_of_transformers(checkpoints["clip"], spoilt, jump.layer)
    assert (jump.worst_image, jump.worst_token) == worst_of(states, reference)


def test_layer_that_is_read_can_be_named(spoilt: Path, checkpoints: dict[str, Path]) -> None:
    """In the graph it has the name of the output."""
    damage(spoilt, "layers.2.mlp.fc1/MatMul")
    evidence: list[ImageEvidence] = []
    certificate = check(spoilt, checkpoints["clip"], quick=True, by_layer=True, on_image=evidence.append)
    jump = first_jump(certificate.layers)
    assert jump is not None
    assert jump.layer == 3
    expected = worst_of([each.bundle for each in evidence], [each.reference for each in evidence])
    assert (jump.worst_image, jump.worst_token) == expected


def test_states_are_compared_with_transformers_and_not_with_the_cut_tower(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tower with its second and third layer swapped has the same weights, and the graph has the same error."""

    def swap(*arguments: Any) -> TruncatedTower:
        tower = truncate(*arguments)
        tower.layers = torch.nn.ModuleList([tower.layers[0], tower.layers[2], tower.layers[1]])
        return tower

    monkeypatch.setattr(reference, "truncate", swap)
    options = ExportOptions(flavour="none", check=False, precision="fp32")
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "b", options).path
    layers = check(bundle, checkpoints["clip"], quick=True, by_layer=True).layers
    for which in ("bundle", "torch"):
        errors = [getattr(layer, which).relative_error for layer in layers]
        assert max(errors[:2]) < SMALL < 0.1 < min(errors[2:])


def test_graph_without_names_for_its_states_asks_for_another_export(spoilt: Path, checkpoints: dict[str, Path]) -> None:
    model = onnx.load(spoilt / GRAPH, load_external_data=False)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace(HIDDEN_STATE, "state-") for name in names]
    for value in model.graph.value_info:
        value.name = value.name.replace(HIDDEN_STATE, "state-")
    onnx.save(model, spoilt / GRAPH)
    make_hashes_fit(spoilt, GRAPH, GRAPH_DATA)
    with pytest.raises(BundleError, match="has no hidden state 0: export it again with --overwrite"):
        check(spoilt, checkpoints["clip"], photographs=1, quick=True, by_layer=True)
    assert check(spoilt, checkpoints["clip"], photographs=1, quick=True).passed
    assert Bundle.open(spoilt).manifest.certificate is None


def test_worst_token_is_in_the_worst_image_in_any_order() -> None:
    reference = torch.ones(1, 4, 8)
    images = {"b.png": (2, 0.5), "a.png": (3, 0.25), "c.png": (0, 0.125)}
    for order in (list(images), list(images)[::-1]):
        sums = LayerSums()
        for name in order:
            token, error = images[name]
            state = reference.clone()
            state[0, token] += error
            sums.add(name, [reference, reference], {0: reference, 1: state}, [reference, reference])
        first, second = sums.figures()
        assert (second.worst_image, second.worst_token) == ("b.png", 2)
        assert first.bundle.relative_error == second.torch.relative_error == 0.0
        assert second.bundle.token_cosine_min == pytest.approx(1.0)  # the errors are along the tokens
        squares = sum(error**2 for _, error in images.values())
        assert second.bundle.relative_error == pytest.approx((squares / (4 * len(images))) ** 0.5)


def test_token_that_is_not_finite_is_the_worst() -> None:
    reference, sums = torch.ones(1, 4, 8), LayerSums()
    for name, token, value in (("a.png", 1, 9.0), ("b.png", 3, float("nan")), ("c.png", 0, 99.0)):
        state = reference.clone()
        state[0, token, 5] = value
        sums.add(name, [reference], {0: state}, [reference])
    (layer,) = sums.figures()
    assert (layer.worst_image, layer.worst_token) == ("b.png", 3)
    assert layer.bundle.non_finite == 1


def with_torch(layers: Sequence[LayerFigures], errors: Sequence[float | None]) -> list[LayerFigures]:
    return [
        replace(layer, torch=made_up.figures(relative_error=error)) for layer, error in zip(layers, errors, strict=True)
    ]


def test_error_that_adds_up_is_not_a_jump_but_three_times_as_much_is() -> None:
    assert first_jump(made_up.layers([1e-4, 2.9e-4, 8e-4, 2e-3])) is None
    jump = first_jump(with_torch(made_up.layers([1e-4, 1.1e-4, 3.5e-4, 1e-1]), [1e-4, 1e-4, 1e-4, 1e-4]))
    assert jump is not None
    assert jump.layer == 2  # the first, and not the largest


def test_layer_that_is_hard_for_pytorch_too_is_not_a_jump() -> None:
    layers = made_up.layers([1e-4, 1e-3, 1e-3, 1e-3])
    assert first_jump(with_torch(layers, [1e-4, 1e-3, 1e-3, 1e-3])) is None
    assert first_jump(with_torch(layers, [1e-4, 2e-4, 1e-3, 1e-3])) == with_torch(layers, [1e-4, 2e-4, 1e-3, 1e-3])[1]


def test_first_layer_that_is_not_finite_is_a_jump() -> None:
    layers = with_torch(made_up.layers([1e-4, 1e-4, None, None]), [1e-4] * 4)
    jump = first_jump(layers)
    assert jump is not None
    assert jump.layer == 2
    assert first_jump(layers[2:]) == layers[2]  # a stem that is not finite
    hard = with_torch(layers, [1e-4, 1e-4, None, None])
    assert first_jump(hard) == hard[2]  # PyTorch's own is not finite either
    assert first_jump(hard[2:]) == hard[2]


def test_wrong_stem_is_named_and_one_that_only_rounds_is_not() -> None:
    damaged = with_torch(made_up.layers([1e-1, 1e-1, 1e-1, 1e-1]), [5e-4] * 4)
    assert first_jump(damaged) == damaged[0]
    assert first_jump(with_torch(made_up.layers([4e-3, 8e-3, 9e-3, 1e-2]), [4e-3, 8e-3, 9e-3, 1e-2])) is None  # BF16
    # PyTorch's simulation of 8 bits has an FP32 stem
    assert first_jump(with_torch(made_up.layers([6e-4, 5e-2, 6e-2, 7e-2]), [0.0, 5e-2, 6e-2, 7e-2])) is None


def test_wrong_first_layer_in_8_bits_is_named_although_pytorch_has_an_exact_stem() -> None:
    sound = with_torch(made_up.layers([4e-4, 9e-3, 1e-2, 1e-2]), [0.0, 9e-3, 1e-2, 1e-2])
    assert first_jump(sound) is None
    wrong = with_torch(made_up.layers([4e-4, 0.97, 1.0, 1.0]), [0.0, 9e-3, 1e-2, 1e-2])
    assert first_jump(wrong) == wrong[1]


def test_wrong_layer_is_named_if_pytorch_overflows() -> None:
    sound = with_torch(made_up.layers([1e-4, 2e-4, 3e-4, 4e-4]), [1e-4, 2e-4, None, None])
    assert first_jump(sound) is None
    for wrong in (2, 3):
        errors = [2e-4 if layer < wrong else 0.8 for layer in range(4)]
        layers = with_torch(made_up.layers(errors), [1e-4, 2e-4, None, None])
        assert first_jump(layers) == layers[wrong]


def test_jump_from_an_error_of_zero_is_found() -> None:
    layers = with_torch(made_up.layers([0.0, 0.0, 1e-2, 1e-2]), [0.0] * 4)
    assert first_jump(layers) == layers[2]
    assert first_jump(with_torch(made_up.layers([0.0, 3e-7, 4e-7, 5e-7]), [0.0] * 4)) is None


def test_damaged_stem_is_named_in_a_graph(spoilt: Path, checkpoints: dict[str, Path]) -> None:
    damage(spoilt, "stem.0.patch_embedding/Conv")
    jump = first_jump(check(spoilt, checkpoints["clip"], quick=True, by_layer=True).layers)
    assert jump is not None
    assert jump.layer == 0


def test_state_before_the_first_layer_is_compared(export: Callable[..., Path], checkpoints: dict[str, Path]) -> None:
    certificate = check(export("clip", select_layer=0, flavour="none"), checkpoints["clip"], quick=True, by_layer=True)
    assert [layer.layer for layer in certificate.layers] == [0]


def test_emulated_layers_receive_the_same_pixels_as_the_bundle(
    export: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    bundle = export("clip", precision="bf16", flavour="none")
    certificate = check(bundle, checkpoints["clip"], quick=True, by_layer=True, backend="emulated-bf16")
    assert certificate.layers[-1].bundle.relative_error == pytest.approx(certificate.bundle.relative_error, rel=1e-6)
