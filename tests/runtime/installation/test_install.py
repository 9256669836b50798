"""Installing and uninstalling work, or leave the model as it was, with an error that names the mismatch."""

import copy
import gc
import logging
import pickle
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import trtower
from tests.conftest import Bundles, make_model
from tests.runtime.installation.hugging_face import inputs, make, tower
from tests.runtime.installation.test_hugging_face import EXACT, logits
from trtower.errors import BackendError, BundleError, ConfigError
from trtower.installation import install as installing
from trtower.installation.find import Slot
from trtower.installation.original import Original
from trtower.tower.vision_tower import VisionTower

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> Any:
    return make("llava")


def storages(module: nn.Module) -> list[StorageWeakRef]:
    return [StorageWeakRef(each.untyped_storage()) for each in module.parameters()]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_leave_the_process_and_come_back_bit_for_bit(model: Any, bundles: Bundles) -> None:
    eager, state = tower(model), snapshot(model)
    held = storages(eager)
    size = sum(each.nbytes for each in eager.parameters())
    installed = trtower.install(model, bundles())
    assert installed.freed == size
    assert all(each.expired() for each in held)
    assert sum(each.nbytes for each in tower(model).parameters()) == 0
    trtower.uninstall(model)
    assert tower(model) is eager
    assert same(snapshot(model), state)
    assert not installed.tower.is_loaded


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed blocks in its heap")
def test_freed_memory_is_returned_to_the_system(model: Any, bundles: Bundles) -> None:
    def resident_mb() -> float:
        return psutil.Process().memory_info().rss / 1e6

    for_a_tower = [torch.ones(25_000) for _ in range(2000)]  # 200 MB in blocks from the C library's heap
    last = torch.ones(25_000)
    del for_a_tower
    before = resident_mb()
    with trtower.install(model, bundles()):
        assert before - resident_mb() > 150
        assert last.sum() == 25_000


def test_original_can_be_kept(model: Any, bundles: Bundles) -> None:
    held = storages(tower(model))
    with trtower.install(model, bundles(), keep_original=True) as installed:
        assert installed.freed == 0
        assert "the eager tower is kept" in str(installed)
        assert not any(each.expired() for each in held)


def test_call_says_what_runs_and_what_was_freed(model: Any, bundles: Bundles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trtower")
    with trtower.install(model, bundles(), backend="onnxruntime-cpu") as installed:
        text = str(installed)
        assert text.startswith(f"<{bundles()} in LlavaForConditionalGeneration.model.vision_tower, on onnxruntime ")
        assert text.endswith(f"; freed {installed.freed / 1e6:.1f} MB>")
        assert text in caplog.text
        assert f"{bundles()}, backend='onnxruntime" in str(model)
    assert "model.vision_tower: the eager tower is back" in caplog.text


def test_second_call_does_nothing_and_the_end_of_its_block_does_not_uninstall(model: Any, bundles: Bundles) -> None:
    first = trtower.install(model, bundles())
    stand_in = tower(model)
    for _ in range(2):
        with trtower.install(model, bundles()) as second:
            assert second is first
        assert tower(model) is stand_in
    assert first.tower.is_loaded
    first.uninstall()
    assert tower(model) is not stand_in


def test_second_call_in_a_block_leaves_uninstalling_to_the_block(model: Any, bundles: Bundles) -> None:
    eager = tower(model)
    with trtower.install(model, bundles()) as installed:
        assert trtower.install(model, bundles()) is installed
        with trtower.install(model, bundles()):
            pass
        assert installed.is_installed
    assert tower(model) is eager


@pytest.mark.parametrize(
    "options",
    [{"backend": "onnxruntime-cpu"}, {"keep_original": True}, {"offload_folder": "."}, {"allow_other_weights": True}],
)
def test_second_call_with_other_options_is_refused(model: Any, bundles: Bundles, options: dict[str, Any]) -> None:
    with trtower.install(model, bundles()) as installed:
        with pytest.raises(
            ConfigError, match=rf"differs from the first \({next(iter(options))}=.*\): call trtower\.uninstall"
        ):
            trtower.install(model, bundles(), **options)
        with pytest.raises(ConfigError, match=r"differs from the first \(bundle="):
            trtower.install(model, bundles(precision="fp16"))
        assert installed.tower.is_loaded


def test_another_bundle_can_follow(model: Any, bundles: Bundles) -> None:
    for precision in ("fp32", "fp16"):
        with trtower.install(model, bundles(precision=precision)) as installed:
            assert installed.tower.bundle.path == bundles(precision=precision)


def test_block_that_raises_brings_the_tower_back(model: Any, bundles: Bundles) -> None:
    eager = tower(model)
    with pytest.raises(ZeroDivisionError), trtower.install(model, bundles()):
        raise ZeroDivisionError
    assert tower(model) is eager


def test_uninstall_without_a_bundle_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="LlavaForConditionalGeneration has no bundle installed"):
        trtower.uninstall(model)


def two_towers() -> nn.Module:
    return nn.ModuleDict({"image_tower": make_model("clip"), "video_tower": make_model("clip")})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 2), "Linear has no vision tower: expected a model of transformers that takes pixel_values in it"),
        (make_model("clip"), r"is itself a vision tower, .* serve its bundle with trtower\.VisionTower\.load"),
        (two_towers(), "2 vision towers, image_tower and video_tower: choose one, as in tower='image_tower'"),
    ],
)
def test_model_without_a_tower_or_with_two_is_refused(model: nn.Module, words: str, bundles: Bundles) -> None:
    with pytest.raises(ConfigError, match=words):
        trtower.install(model, bundles())


def test_one_of_two_towers_can_be_named(bundles: Bundles) -> None:
    model = two_towers()
    eager = dict(model.items())
    with trtower.install(model, bundles(), tower="video_tower"):
        assert model["image_tower"] is eager["image_tower"]
        assert model["video_tower"] is not eager["video_tower"]
        trtower.install(model, bundles(), tower="image_tower")
        with pytest.raises(ConfigError, match="no vision tower at 'audio'; it has image_tower and"):
            trtower.install(model, bundles(), tower="audio")
    assert model["video_tower"] is eager["video_tower"]
    trtower.uninstall(model)
    assert dict(model.items()) == eager


def test_tower_held_twice_is_replaced_twice(model: Any, bundles: Bundles) -> None:
    eager = tower(model)
    model.shortcut = eager
    with trtower.install(model, bundles()):
        assert model.shortcut is tower(model)
        assert model.shortcut is not eager
    assert model.shortcut is tower(model) is eager


def test_contrastive_model_is_refused(bundles: Bundles) -> None:
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=make_model("clip").config.to_dict())
    model = transformers.CLIPModel(config).eval()
    with pytest.raises(
        ConfigError, match=r"reads the pooled vector|has no vision tower"
    ):  # in 4.57 it holds no model with a tower
        trtower.install(model, bundles())


def nothing(model: Any) -> None:
    pass


def other_weights(model: Any) -> None:
    with torch.no_grad():
        next(tower(model).parameters()).view(-1)[0] += 1e-3


def added_adapter(model: Any) -> None:
    layer = getattr(tower(model), "vision_model", tower(model)).encoder.layers[1]
    layer.mlp.fc1.lora_A = nn.Linear(2, 2)


def another_activation(model: Any) -> None:
    tower(model).config.hidden_act = "gelu"


def another_layer(model: Any) -> None:
    model.config.vision_feature_layer = -1


def mixed_dtypes(model: Any) -> None:
    layer = getattr(tower(model), "vision_model", tower(model)).encoder.layers[1]
    layer.mlp.fc1.half()


def test_tower_in_half_precision_may_keep_some_weights_in_fp32(model: Any, bundles: Bundles) -> None:
    eager = tower(model).to(torch.bfloat16)
    embeddings = getattr(eager, "vision_model", eager).embeddings.float()
    embeddings.register_forward_hook(lambda module, given, states: states.to(torch.bfloat16))  # as openpi's code does
    dtypes = {name: each.dtype for name, each in eager.named_parameters()}
    before = {name: each.clone() for name, each in eager.state_dict().items()}
    with trtower.install(model, bundles()):
        assert next(tower(model).parameters()).dtype == torch.bfloat16
    after = tower(model)
    assert {name: each.dtype for name, each in after.named_parameters()} == dtypes
    assert all(torch.equal(each, before[name]) for name, each in after.state_dict().items())
    embeddings.patch_embedding.weight.data[0] += 0.01
    with pytest.raises(ConfigError, match="has other weights than"):
        trtower.install(model, bundles())


def layers_of(model: Any) -> Any:
    return getattr(tower(model), "vision_model", tower(model)).encoder.layers


def swapped_layers(model: Any) -> None:
    layers = layers_of(model)
    layers[0], layers[1] = layers[1], layers[0]


def patched_forward(model: Any) -> None:
    eager = tower(model).forward
    tower(model).forward = lambda pixel_values, **options: eager(pixel_values.flip(-1), **options)


def hooked_layer(model: Any) -> None:
    layer = layers_of(model)[1].mlp
    layer.register_forward_hook(lambda module, arguments, output: 2 * output)


def in_training(model: Any) -> None:
    model.train()


def with_gradients(model: Any) -> None:
    for parameter in tower(model).parameters():
        parameter.grad = torch.zeros_like(parameter)


def aliased_part(model: Any) -> None:
    model.probe = layers_of(model)[0]


def tied_weight(model: Any) -> None:
    model.tied = nn.Linear(1, 1)
    model.tied.weight = layers_of(model)[0].mlp.fc1.weight


def offloaded(model: Any) -> None:
    layer = getattr(tower(model), "vision_model", tower(model)).encoder.layers[1]
    layer.mlp.fc1.to("meta")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (swapped_layers, r"differ on the same image: hidden state 3 is off by \d+%, expected at most 10%"),
        (patched_forward, r"differ on the same image: hidden state 3 is off by \d+%, expected at most 10%"),
        (hooked_layer, r"differ on the same image: hidden state 3 is off by \d+%, expected at most 10%"),
        (
            in_training,
            r"is in training mode, .*: call model\.eval\(\) first, or model\.model\.vision_tower\.eval\(\) to",
        ),
        (with_gradients, r"has gradients, which would be lost: call model\.zero_grad\(\) first"),
        (aliased_part, r"probe is a part of model\.vision_tower, .*set keep_original=True"),
        (tied_weight, r"tied\.weight is a part of model\.vision_tower"),
        (other_weights, "has other weights than .*, which was made of .*tiny-clip"),
        (added_adapter, "has other weights than"),
        (
            another_activation,
            "was made of a tower with hidden_act=quick_gelu; model.vision_tower of this model has gelu",
        ),
        (
            another_layer,
            r"reads vision_feature_layer=-1, hidden state 4 of 4 layers; .* holds 3\. Export a bundle with it: ",
        ),
        (mixed_dtypes, "holds weights in float16, so it is at least partly quantised or converted"),
        (offloaded, r"fc1\.weight is on the meta device"),
    ],
)
def test_model_that_does_not_fit_is_refused_and_left_as_it_is(
    model: Any, bundles: Bundles, spoil: Callable[[Any], None], words: str
) -> None:
    spoil(model)
    eager, held = tower(model), storages(tower(model))
    with pytest.raises(ConfigError, match=words):
        trtower.install(model, bundles())
    assert tower(model) is eager
    assert not any(each.expired() for each in held)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bundle_that_overflows_is_refused(
    model: Any, bundles: Bundles, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    run = VisionTower._run

    def overflow(*arguments: Any, **options: Any) -> torch.Tensor:
        tokens = run(*arguments, **options)
        tokens[0, -1] = value
        return tokens

    monkeypatch.setattr(VisionTower, "_run", overflow)
    eager = tower(model)
    with pytest.raises(ConfigError, match="returns NaN or infinity in hidden state 3, but model"):
        trtower.install(model, bundles())
    assert tower(model) is eager


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"tower": "siglip"},
            r"is of family siglip \(siglip_vision_model\); model\.vision_tower .* \(clip_vision_model\)\. "
            r"Export the model's own checkpoint, if `trtower export` supports clip_vision_model\.",
        ),
        ({"image_size": 56}, r"accepts images of 56 pixels; .* accepts 42\. Export the model's own checkpoint\."),
        ({"layer": 2}, r"hidden state 3 of 4 layers; .* holds 2\. Export a bundle with it: .*--select-layer=-2"),
    ],
)
def test_bundle_that_does_not_fit_is_refused(model: Any, bundles: Bundles, options: dict[str, Any], words: str) -> None:
    eager = tower(model)
    with pytest.raises(ConfigError, match=words):
        trtower.install(model, bundles(**options))
    assert tower(model) is eager


@pytest.mark.parametrize(
    ("spoil", "options"),
    [(other_weights, {}), (another_activation, {}), (nothing, {"image_size": 56})],
)
def test_mismatch_has_the_command_that_exports_the_checkpoint_of_the_model(
    model: Any, bundles: Bundles, spoil: Callable[[Any], None], options: dict[str, Any]
) -> None:
    spoil(model)
    model.config._name_or_path = "acme/eyes-7b"
    command = r"trtower export acme/eyes-7b --precision fp32 --flavour none --batch 1,2,4 --out \S+-own$"
    with pytest.raises(ConfigError, match=rf"Export the model's own checkpoint: {command}"):
        trtower.install(model, bundles(**options))


def test_weights_changed_after_loading_must_be_saved_first(
    model: Any, bundles: Bundles, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other_weights(model)
    monkeypatch.chdir(checkpoints["clip"].parent)
    model.config._name_or_path = checkpoints["clip"].name
    with pytest.raises(
        ConfigError,
        match=r"was changed after it was loaded, or .* the folder that model\.save_pretrained writes\.$",
    ):
        trtower.install(model, bundles())


def test_command_for_a_tower_cut_in_memory_names_the_state_that_it_reads(
    model: Any, bundles: Bundles, checkpoints: dict[str, Path]
) -> None:
    holder = getattr(tower(model), "vision_model", tower(model)).encoder
    holder.layers = holder.layers[:3]
    with pytest.raises(ConfigError, match=r"hidden state 2 of 3 layers; .* --select-layer=2 "):
        trtower.install(model, bundles())
    holder.layers = holder.layers[:2]
    model.config._name_or_path = str(checkpoints["clip"])
    with pytest.raises(ConfigError, match=r"has only 2 layers\. The model was changed after it was loaded"):
        trtower.install(model, bundles())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_is_refused(model: Any, bundles: Bundles) -> None:
    given = inputs(model, "llava", "one image")["pixel_values"]
    with trtower.install(model, bundles()), pytest.raises(BackendError, match=r"cannot be traced by torch\.jit"):
        torch.jit.trace(lambda pixels: tower(model)(pixels, output_hidden_states=True).hidden_states[-2], given)


def test_second_call_without_allow_other_weights_is_refused(model: Any, bundles: Bundles) -> None:
    other_weights(model)
    with (
        trtower.install(model, bundles(), allow_other_weights=True),
        pytest.raises(ConfigError, match="\\(allow_other_weights=False\\)"),
    ):
        trtower.install(model, bundles())


def test_layer_of_the_same_weights_is_exported_from_the_checkpoint_of_the_bundle(model: Any, bundles: Bundles) -> None:
    model.config._name_or_path = "acme/eyes-7b"
    another_layer(model)
    with pytest.raises(ConfigError, match=r"Export a bundle with it: trtower export \S*tiny-clip --select-layer=-1 "):
        trtower.install(model, bundles())
    other_weights(model)
    with pytest.raises(ConfigError, match="has other weights than"):
        trtower.install(model, bundles())


def test_other_weights_can_be_allowed(model: Any, bundles: Bundles) -> None:
    given = inputs(model, "llava", "one image")
    expected = logits(model, given)
    with torch.no_grad():
        for parameter in tower(model).parameters():
            parameter.zero_()
    with trtower.install(model, bundles(), allow_other_weights=True):
        assert (logits(model, given) - expected).abs().max() <= EXACT


def test_tower_in_bf16_of_a_checkpoint_in_fp32_is_recognised(model: Any, bundles: Bundles) -> None:
    with trtower.install(model.bfloat16(), bundles()):
        found = tower(model)(torch.randn(1, 3, 42, 42), output_hidden_states=True)
    assert found.hidden_states[-2].dtype == torch.bfloat16


def test_rehearsal_is_refused_unless_allowed(model: Any, bundles: Bundles) -> None:
    rehearsal = bundles(random_weights=True)
    with pytest.raises(BundleError, match=r"is a rehearsal, with random weights, .* allow_random_weights=True"):
        trtower.install(model, rehearsal, allow_other_weights=True)
    with trtower.install(model, rehearsal, allow_random_weights=True) as installed:
        assert installed.tower.is_loaded


def test_uncertified_bundle_is_refused_if_a_certificate_is_required(model: Any, bundles: Bundles) -> None:
    with pytest.raises(BundleError, match="is not certified: it has no certificate"):
        trtower.install(model, bundles(), require_certificate=True)


def broken(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "where",
    [
        (VisionTower, "load"),
        (installing, "check_answers"),
        (Original, "__init__"),
        (Original, "write"),
        (Slot, "put"),
        (Original, "drop"),
        (Original, "_exchange"),
    ],
    ids=lambda where: where[1],
)
def test_failure_half_way_leaves_the_model_as_it_was(
    model: Any, bundles: Bundles, where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(model, "llava", "one image")
    eager, state, before = tower(model), snapshot(model), logits(model, given)
    opened: list[VisionTower] = []
    load = VisionTower.load
    monkeypatch.setattr(VisionTower, "load", lambda *a, **k: opened.append(load(*a, **k)) or opened[0])
    monkeypatch.setattr(*where, broken)
    with pytest.raises(ZeroDivisionError):
        trtower.install(model, bundles())
    monkeypatch.undo()
    assert tower(model) is eager
    assert same(snapshot(model), state)
    assert torch.equal(logits(model, given), before)
    assert not any(each.is_loaded for each in opened)
    with trtower.install(model, bundles()):
        assert tower(model) is not eager


def test_failing_slot_leaves_the_others_as_they_were(model: Any, bundles: Bundles) -> None:
    class Stubborn(list[Any]):
        def __setitem__(self, index: Any, value: Any) -> None:
            raise ZeroDivisionError(index, value)

    eager = tower(model)
    model.shortcuts = Stubborn([eager])
    with pytest.raises(ZeroDivisionError):
        trtower.install(model, bundles())
    assert model.shortcuts[0] is tower(model) is eager
    assert all(each.numel() for each in eager.parameters())


def test_altered_bundle_and_backend_that_cannot_run_leave_the_model_as_it_was(
    model: Any, bundles: Bundles, tmp_path: Path
) -> None:
    eager = tower(model)
    spoilt = Path(shutil.copytree(bundles(), tmp_path / "spoilt"))
    data = spoilt / "tower.onnx.data"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    with pytest.raises(BundleError, match="was altered"):
        trtower.install(model, spoilt)
    with pytest.raises(BackendError, match="tensorrt"):
        trtower.install(model, bundles(), backend="tensorrt")
    with pytest.raises(BundleError, match="does not exist"):
        trtower.install(model, tmp_path / "none")
    assert tower(model) is eager


def test_folder_that_cannot_hold_the_weights_is_refused(model: Any, bundles: Bundles, small_disk: Path) -> None:
    eager = tower(model)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(700_000))
    for folder in (small_disk, small_disk / "none"):
        with pytest.raises(ConfigError, match=r"could not save .*offload_folder=, or keep .* keep_original=True"):
            trtower.install(model, bundles(), offload_folder=folder)
        assert tower(model) is eager
    filler.unlink()
    with trtower.install(model, bundles(), offload_folder=small_disk):
        assert list(small_disk.iterdir()) == []  # the file has no name
    assert tower(model) is eager


def test_weights_that_cannot_be_read_back_leave_the_bundle_installed(
    model: Any, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = trtower.install(model, bundles())
    stand_in = tower(model)
    monkeypatch.setattr(Original, "_read", broken)
    with pytest.raises(ZeroDivisionError):
        trtower.uninstall(model)
    assert tower(model) is stand_in
    assert installed.tower.is_loaded


def test_compiled_tower_is_refused_and_a_compiled_model_is_not(model: Any, bundles: Bundles) -> None:
    given = inputs(model, "llava", "one image")
    before = logits(model, given)
    compiled: Any = torch.compile(model, backend="eager")
    with trtower.install(compiled, bundles()) as installed:
        calls: list[int] = []
        installed.tower.on_batch = lambda report: calls.append(report.batch)
        assert (logits(compiled, given) - before).abs().max() <= EXACT
        assert calls == [1]
    model.model.vision_tower = torch.compile(tower(model), backend="eager")
    with pytest.raises(ConfigError, match=r"was compiled by torch\.compile, which would keep running the old tower"):
        trtower.install(model, bundles())


def test_model_is_not_copied_or_pickled_with_an_engine_in_it(model: Any, bundles: Bundles) -> None:
    with trtower.install(model, bundles()):
        for take in (copy.deepcopy, pickle.dumps):
            with pytest.raises(BackendError, match=r"its engine belongs to this process: .*uninstall\(model\)"):
                take(model)
    assert same(snapshot(copy.deepcopy(model)), snapshot(model))


@pytest.mark.parametrize("keep_original", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_model_is_saved_with_its_own_weights(
    model: Any, bundles: Bundles, tmp_path: Path, keep_original: bool, dtype: torch.dtype
) -> None:
    expected = snapshot(make("llava").to(dtype))
    with trtower.install(model, bundles(), keep_original=keep_original):
        model.to(dtype)
        assert same(snapshot(model), expected)
        model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert same(snapshot(again), expected)


def test_weights_for_the_tower_are_refused(model: Any, bundles: Bundles) -> None:
    state = snapshot(model)
    with trtower.install(model, bundles()):
        with pytest.raises(
            RuntimeError, match=r"model\.vision_tower\.\* cannot be loaded, because the tower is compiled"
        ):
            model.load_state_dict(state)
        rest = {name: tensor for name, tensor in state.items() if "vision_tower" not in name}
        assert not model.load_state_dict(rest, strict=False).unexpected_keys


def test_tower_of_fewer_layers_than_the_bundle_reads_is_refused(model: Any, bundles: Bundles) -> None:
    del layers_of(model)[2:]
    model.config.vision_feature_layer = -1
    with pytest.raises(
        ConfigError, match=r"holds a state of layer 3; model\.vision_tower of this model has only 2 layers"
    ):
        trtower.install(model, bundles(), allow_other_weights=True)


def test_bundle_follows_the_model(model: Any, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    with trtower.install(model, bundles()) as installed:
        moved: list[torch.Tensor] = []
        move = VisionTower._apply
        monkeypatch.setattr(VisionTower, "_apply", lambda self, fn: moved.append(fn(torch.ones(1))) or move(self, fn))
        model.to("cpu", torch.float16)  # tests/gpu moves it to another device
        assert [each.dtype for each in moved] == [torch.float16]
        assert installed.tower.dtype == torch.float32


def test_model_is_cast_and_moved_around_the_bundle(model: Any, bundles: Bundles) -> None:
    eager = tower(model)
    with trtower.install(model, bundles()):
        model.to(dtype=torch.bfloat16)
        assert tower(model).dtype == model.dtype == torch.bfloat16
        given = inputs(model, "llava", "one image")
        assert logits(model, given).dtype == torch.bfloat16
        assert model.to("cpu").device == torch.device("cpu")
    assert tower(model) is eager
    assert eager.dtype == torch.bfloat16


def test_import_of_install_imports_no_transformers(bundles: Bundles) -> None:
    code = (
        "import sys, torch, trtower\n"
        f"try: trtower.install(torch.nn.Linear(1, 1), {str(bundles())!r})\n"
        "except trtower.ConfigError as err: print(err, 'transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.startswith("Linear has no vision tower")
    assert found.stdout.endswith("False\n")


def test_public_functions_are_those_of_the_package() -> None:
    assert trtower.install is installing.install
    assert trtower.uninstall is installing.uninstall


def test_threads_that_save_get_the_towers_weights(model: Any, bundles: Bundles) -> None:
    state = snapshot(model)
    with trtower.install(model, bundles()), ThreadPoolExecutor(4) as threads:
        saved = list(threads.map(lambda _: snapshot(model), range(40)))
    assert all(same(each, state) for each in saved)


def test_threads_that_install_at_once_install_once(model: Any, bundles: Bundles) -> None:
    state = snapshot(model)
    with ThreadPoolExecutor(2) as threads:
        installed = list(threads.map(lambda _: trtower.install(model, bundles()), range(2)))
    assert installed[0].tower is installed[1].tower
    trtower.uninstall(model)
    assert same(snapshot(model), state)


def test_tower_that_two_models_share_is_freed_once(model: Any, bundles: Bundles, tmp_path: Path) -> None:
    other, given = make("llava"), inputs(model, "llava", "one image")
    other.model.vision_tower = tower(model)
    before = logits(other, given)
    with trtower.install(model, bundles()):
        with pytest.raises(ConfigError, match="a bundle in another model with the same tower has freed them"):
            trtower.install(other, bundles())
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            logits(other, given)
        with pytest.raises(Exception, match="meta"):  # transformers must raise something, and not save empty weights
            other.save_pretrained(tmp_path)
    assert torch.equal(logits(other, given), before)


def test_shared_parts_can_be_kept(model: Any, bundles: Bundles) -> None:
    aliased_part(model)
    with trtower.install(model, bundles(), keep_original=True):
        assert model.probe.mlp.fc1.weight.numel()


@pytest.mark.parametrize("keep_original", [False, True])
def test_tower_comes_back_in_the_mode_that_the_model_is_in(model: Any, bundles: Bundles, keep_original: bool) -> None:
    eager = tower(model)
    with trtower.install(model, bundles(), keep_original=keep_original):
        model.train()
        model.requires_grad_(requires_grad=False)
    assert all(each.training for each in eager.modules())
    assert not any(each.requires_grad for each in eager.parameters())
    model.eval()
    with trtower.install(model, bundles(), keep_original=keep_original):
        model.requires_grad_()
    assert not any(each.training for each in eager.modules())
    assert all(each.requires_grad for each in eager.parameters())


def test_weights_come_back_under_any_default_device_and_inference_mode(model: Any, bundles: Bundles) -> None:
    state, given = snapshot(model), inputs(model, "llava", "one image")
    with torch.device("meta"), torch.inference_mode():
        installed = trtower.install(model, bundles())
        assert same(model.state_dict(), state)
        installed.uninstall()
    assert same(snapshot(model), state)
    model(**given).logits.sum().backward()  # no inference tensors


def test_bundle_cannot_be_taken_out_inside_its_own_call(model: Any, bundles: Bundles) -> None:
    given = inputs(model, "llava", "one image")
    with trtower.install(model, bundles()) as installed:
        installed.tower.on_batch = lambda report: trtower.uninstall(model)
        with pytest.raises(BackendError, match="cannot be closed or moved inside its own call"):
            logits(model, given)
        assert installed.is_installed
        installed.tower.on_batch = None
        assert logits(model, given) is not None


def test_block_ends_quietly_if_the_bundle_was_taken_out_in_it(model: Any, bundles: Bundles) -> None:
    eager = tower(model)
    with trtower.install(model, bundles()):
        trtower.uninstall(model)
    assert tower(model) is eager


def test_installation_takes_out_only_its_own_bundle(model: Any, bundles: Bundles) -> None:
    first = trtower.install(model, bundles())
    trtower.uninstall(model)
    second = trtower.install(model, bundles(precision="fp16"))
    assert not first.is_installed
    assert str(first) == f"<{bundles()}, taken out of LlavaForConditionalGeneration.model.vision_tower>"
    with pytest.raises(ConfigError, match=r"is no longer in Llava\w+\.model\.vision_tower: it was already taken out"):
        first.uninstall()
    with pytest.raises(ConfigError, match="is no longer in"), first:
        pass
    assert second.is_installed
    second.uninstall()


def test_second_call_opens_a_closed_tower_and_notices_a_changed_bundle(
    model: Any, bundles: Bundles, tmp_path: Path
) -> None:
    given = inputs(model, "llava", "one image")
    bundle = Path(shutil.copytree(bundles(), tmp_path / "bundle"))
    with trtower.install(model, bundle) as installed:
        installed.tower.close()
        trtower.install(model, bundle)
        assert logits(model, given) is not None
        shutil.rmtree(bundle)
        shutil.copytree(bundles(precision="fp16"), bundle)
        with pytest.raises(ConfigError, match="the bundle has changed on disk"):
            trtower.install(model, bundle)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": None}, "model is of type NoneType; expected a loaded model"),
        ({"model": "llava"}, "model is of type str"),
        ({"model": "engines/llava", "bundle": nn.Linear(1, 1)}, "model is of type str; expected a loaded model"),
        ({"bundle": None}, "bundle is of type NoneType; expected the path of a folder"),
        ({"bundle": nn.Linear(1, 1)}, "bundle is of type Linear; expected the path"),
        ({"bundle": "~nobody-of-this-name/x"}, "bundle is '~nobody-of-this-name/x'; expected the path"),
        ({"bundle": "a\0b"}, r"bundle is 'a\\x00b'; expected the path of a folder, without NUL"),
        ({"offload_folder": 5}, "offload_folder is of type int; expected the path"),
        ({"engine": "fast"}, r"engine is 'fast'; expected trtower\.EngineOptions"),
        ({"tower": nn.Linear(1, 1)}, "tower is of type Linear; expected its path"),
        ({"tower": "model.tower"}, r"has no vision tower at 'model\.tower'; it has model\.vision_tower"),
    ],
)
def test_arguments_of_other_types_are_refused(
    model: Any, bundles: Bundles, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        trtower.install(**{"model": model, "bundle": bundles(), **arguments})


def test_tower_can_be_named_by_each_of_its_paths(model: Any, bundles: Bundles) -> None:
    model.shortcut = tower(model)
    with trtower.install(model, bundles(), tower="shortcut") as installed:
        assert installed.path == "model.vision_tower"
        trtower.uninstall(model, tower="shortcut")


def test_tower_only_reachable_through_get_vision_tower_is_refused(model: Any, bundles: Bundles) -> None:
    model.get_vision_tower = broken  # not called, because the model holds the tower itself
    with trtower.install(model, bundles()):
        pass
    hidden: Any = nn.Linear(1, 1)
    hidden.get_vision_tower = lambda: tower(model)
    with pytest.raises(
        ConfigError, match="has a vision tower that no attribute or list of its modules holds, so it cannot be replaced"
    ):
        trtower.install(hidden, bundles())


def test_repeated_installs_leave_no_file_open(model: Any, bundles: Bundles) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    trtower.install(model, bundles()).uninstall()
    before = open_files()
    for _ in range(5):
        trtower.install(model, bundles()).uninstall()
    assert open_files() == before


def test_model_that_is_dropped_with_a_bundle_in_it_closes_its_file(bundles: Bundles) -> None:
    model = make("llava")
    trtower.install(model, bundles())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        del model
        gc.collect()
    assert [each for each in caught if "unclosed file" in str(each.message)] == []
