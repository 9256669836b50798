"""From a bundle with many hidden states, every layer code reads what the eager towers read."""

import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import BATCH, IMAGE_SIZE, PATCH_SIZE, WIDTH
from trtower import Bundle, CLIPVisionTower, VisionTower
from trtower.cli import run
from trtower.errors import ConfigError
from trtower_export.pipeline import ExportOptions, export_tower

NUM_LAYERS = 12
HELD = (9, 0, 5, 6, 7, 2, 1, 12, 3, 11, 8, 10, 4)
"""Every hidden state of 12 layers, in an order that no layer code has."""

FP32_TOLERANCE = 2e-5
"""ONNX Runtime and PyTorch sum in different orders; values here are of the order of 1."""

PICKS = [
    (-2, "patch"),
    (0, "patch"),
    (12, "cls_patch"),
    ([-2, -5, 6], "patch"),
    ([3, 3], "cls_patch"),
    (-212, "patch"),
    (-2, "slicefour_patch"),
    (-2, "slicefour_cls_patch"),
    (-3, "slicefour_patch"),
    (-2, "slice_m25811_f6_patch"),
    (-2, "slice_m25811_f6_cls_patch"),
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(3)
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    model = transformers.CLIPVisionModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def bundle(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deep")
    model.save_pretrained(root / "checkpoint")
    options = ExportOptions(select_layer=HELD, precision="fp32", flavour="none", profiles=(BATCH,), check=False)
    return export_tower(str(root / "checkpoint"), root / "bundle", options).path


@pytest.fixture(scope="module")
def output(model: torch.nn.Module) -> Any:
    with torch.no_grad():
        return model(images(), output_hidden_states=True)


def images() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def config(layer: Any, feature: str = "patch") -> SimpleNamespace:
    return SimpleNamespace(mm_vision_select_layer=layer, mm_vision_select_feature=feature)


def read_eagerly(states: tuple[torch.Tensor, ...], layer: Any, feature: str) -> torch.Tensor:
    """Read what LLaVA-NeXT's feature_select reads, VipLlava's lists, and tinychat's two layers in one number."""
    if feature.startswith("slicefour"):
        step = len(states) // 4
        layers = list(range(step + layer, len(states), step))
    elif feature.startswith("slice_m25811_f6"):
        layers = [-2, -5, -8, -11, 6]
    elif isinstance(layer, list):
        layers = layer
    else:
        layers = [layer] if abs(layer) <= 100 else [abs(layer) % 100, -(abs(layer) // 100)]
    tokens = torch.cat([states[i] for i in layers], dim=-1)
    return tokens if feature.endswith("cls_patch") else tokens[:, 1:]


@pytest.mark.parametrize(("layer", "feature"), PICKS)
def test_code_of_a_config_reads_what_the_eager_tower_reads(bundle: Path, output: Any, layer: Any, feature: str) -> None:
    tower = CLIPVisionTower(bundle, config(layer, feature))
    expected = read_eagerly(output.hidden_states, layer, feature)
    features = tower(images())
    assert features.shape == expected.shape
    assert torch.allclose(features, expected, atol=FP32_TOLERANCE)
    assert torch.equal(tower.feature_select(output), expected)
    assert tower.hidden_size == expected.shape[-1] == tower.dummy_feature.shape[-1]
    assert (tower.select_layer, tower.select_feature) == (layer, feature)


@pytest.mark.parametrize(("layer", "feature"), PICKS)
def test_code_is_read_without_a_config(bundle: Path, output: Any, layer: Any, feature: str) -> None:
    tower = VisionTower.load(bundle, select_layer=layer, select_feature=feature)
    assert torch.allclose(tower(images()), read_eagerly(output.hidden_states, layer, feature), atol=FP32_TOLERANCE)


def test_list_of_images_is_read_with_the_pick(bundle: Path, output: Any) -> None:
    tower = CLIPVisionTower(bundle, config([4, -1]))
    expected = read_eagerly(output.hidden_states, [4, -1], "patch")
    for features, reference in zip(tower(list(images())), expected.split(1), strict=True):
        assert torch.allclose(features, reference, atol=FP32_TOLERANCE)


def test_without_a_code_everything_is_read_in_the_order_of_the_bundle(bundle: Path, output: Any) -> None:
    tower = VisionTower.load(bundle)
    assert tower.select_layer == list(HELD)
    assert tower.hidden_size == WIDTH * len(HELD)
    expected = read_eagerly(output.hidden_states, list(HELD), "patch")
    assert torch.allclose(tower(images()), expected, atol=FP32_TOLERANCE)
    assert torch.equal(tower.feature_select(output), expected)


@pytest.mark.parametrize(("code", "is_view"), [(list(HELD), True), ([5, 6, 7], True), ([3], True), ([7, 6], False)])
def test_neighbours_are_read_without_a_copy(bundle: Path, code: list[int], is_view: bool) -> None:
    tower = VisionTower(bundle, select_layer=code)
    tokens = torch.randn(2, tower.spec.num_tokens, tower.spec.hidden_size)
    features = tower.feature_select(tokens)
    assert (features.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()) == is_view
    starts = [HELD.index(layer) * WIDTH for layer in code]
    assert torch.equal(features, torch.cat([tokens[:, 1:, start : start + WIDTH] for start in starts], dim=-1))


def test_last_hidden_state_is_read_after_the_norm(export: Callable[..., Path], checkpoints: dict[str, Path]) -> None:
    path = export("dinov2", select_layer=(2, "last_hidden_state", -1), precision="fp32", flavour="none")
    model = transformers.Dinov2Model.from_pretrained(checkpoints["dinov2"]).eval()
    with torch.no_grad():
        output = model(images(), output_hidden_states=True)
    last, before = output.last_hidden_state[:, 1:], output.hidden_states[-1][:, 1:]
    assert not torch.allclose(last, before, atol=0.1)
    whole = VisionTower.load(path)
    assert whole.select_layer == [2, "last_hidden_state", 4]
    for code, expected in (("last_hidden_state", last), (-1, before), ([-1, "last_hidden_state"], (before, last))):
        tower = CLIPVisionTower(path, config(code))
        expected = torch.cat(expected, dim=-1) if isinstance(expected, tuple) else expected
        assert torch.allclose(tower(images()), expected, atol=FP32_TOLERANCE)
        assert torch.equal(tower.feature_select(output), expected)
    with pytest.raises(
        ConfigError, match=r"hidden state 3 of 4 layers, but .* contains only 2, last_hidden_state, 4\."
    ):
        CLIPVisionTower(path, config(-2))


def test_feature_and_layer_can_be_changed(bundle: Path, output: Any) -> None:
    tower = CLIPVisionTower(bundle, config(-2))
    for name, value in (
        ("select_layer", -4),
        ("select_feature", "cls_patch"),
        ("select_layer", -2),
        ("select_feature", "slicefour_patch"),
        ("select_layer", -1),
        ("select_feature", "slice_m25811_f6_cls_patch"),
        ("select_feature", "patch"),
    ):
        setattr(tower, name, value)
        expected = read_eagerly(output.hidden_states, tower.select_layer, tower.select_feature)
        assert torch.allclose(tower(images()), expected, atol=FP32_TOLERANCE)
        assert tower.hidden_size == expected.shape[-1]


def test_refused_change_changes_nothing(export: Callable[..., Path]) -> None:
    tower = VisionTower.load(export("clip", select_layer=(4, 1, 3), precision="fp32", flavour="none"))
    for name, value in (("select_layer", 2), ("select_layer", "x"), ("select_feature", "slicefour_patch")):
        with pytest.raises(ConfigError):
            setattr(tower, name, value)
        assert (tower.select_layer, tower.select_feature, tower.hidden_size) == ([4, 1, 3], "patch", 3 * WIDTH)


def test_select_sets_both_if_one_at_a_time_would_be_refused(export: Callable[..., Path]) -> None:
    tower = CLIPVisionTower(
        export("clip", select_layer=(4, 1, 3, 2), precision="fp32", flavour="none"), config(1, "slicefour_patch")
    )
    for name, value in (("select_layer", -1), ("select_layer", [3])):
        with pytest.raises(ConfigError):
            setattr(tower, name, value)
    tower.select([3], "patch")
    assert tower(images()).shape == (3, 9, WIDTH)


@pytest.mark.parametrize(
    ("layer", "feature", "reading", "option"),
    [
        (-4, "patch", "select_layer=-4 reads hidden state 1 of 4 layers", "--select-layer=-4 "),
        ([-1, -4], "patch", r"select_layer=\[-1, -4\] reads hidden state 4, 1 of", "--select-layer=-1,-4 "),
        ("last_hidden_state", "patch", "reads hidden state last_hidden_state of", "--select-layer=last_hidden_state "),
        (-102, "patch", "select_layer=-102 reads hidden state 2, 4 of", "--select-layer=-102 "),
        (0, "slicefour_patch", "select_layer=0 with slicefour_patch reads hidden state 1, 2, 3, 4", "=1,2,3,4 "),
    ],
)
def test_error_for_a_missing_layer_names_both_and_the_command(
    export: Callable[..., Path], layer: Any, feature: str, reading: str, option: str
) -> None:
    path = export("clip", select_layer=(4, 3), precision="fp32", flavour="none")
    with pytest.raises(
        ConfigError, match=rf"{reading}.*, but {path} contains only 4, 3\. Export it: trtower export "
    ) as caught:
        CLIPVisionTower(path, config(layer, feature))
    message = str(caught.value)
    assert "\n" not in message
    assert option in message
    assert " --select-feature patch --image-size 42 --precision fp32 --flavour none --batch 1,2,4 --out " in message


def test_command_omits_the_flavour_if_the_bundle_has_a_plan(clip_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"--precision fp16 --batch 1,2,4 --out "):
        CLIPVisionTower(clip_bundle, config(0, "patch"))


def test_command_in_the_message_exports_the_missing_layers(export: Callable[..., Path], tmp_path: Path) -> None:
    """The command names the plain layers of a slice."""
    path = export("clip", precision="fp32", flavour="none")
    with pytest.raises(ConfigError) as caught:
        CLIPVisionTower(path, config(0, "slicefour_patch"))
    command = shlex.split(str(caught.value).partition("Export it: trtower ")[2])
    assert run([*command, "--out", str(tmp_path / "bundle"), "--flavour", "none", "--no-check"]) == 0
    assert CLIPVisionTower(tmp_path / "bundle", config(0, "slicefour_patch"))(images()).shape == (3, 9, 4 * WIDTH)


def test_num_patches_counts_cls_for_llava_next_only(bundle: Path) -> None:
    for feature, next_counts in (("patch", 9), ("cls_patch", 10), ("slicefour_cls_patch", 10)):
        assert CLIPVisionTower(bundle, config(-2, feature), delay_load=True).num_patches == 9
        tower = CLIPVisionTower(bundle, config(-2, feature), delay_load=True, count_cls=True)
        assert tower.num_patches == next_counts
        assert VisionTower(bundle, select_layer=-2, select_feature=feature, count_cls=True).num_patches == next_counts
        tower.select_feature = "patch"
        assert tower.num_patches == 9


def test_command_in_the_message_keeps_what_stays_in_fp32(export: Callable[..., Path], tmp_path: Path) -> None:
    kept = ("layers.0.mlp.fc2", "layers.3.mlp.fc2")
    path = export("clip", select_layer=(4,), flavour="none", keep_fp32=kept)
    with pytest.raises(ConfigError, match="Export it: trtower export ") as caught:
        CLIPVisionTower(path, config(-3, "patch"))  # without the last two layers
    command = shlex.split(str(caught.value).partition("Export it: trtower ")[2])
    assert run([*command, "--no-check", "--out", str(tmp_path / "b")]) == 0
    assert Bundle.open(tmp_path / "b").manifest.keep_fp32 == kept[:1]
