"""A bundle with a projector in a loaded model: it replaces tower and projector, and both come back."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import trtower
from tests.conftest import IMAGE_SIZE as SMALL
from tests.conftest import WIDTH
from tests.export.heads import models
from tests.export.heads.models import IMAGE_SIZE, KINDS, TEXT_WIDTH, make, pixels
from tests.export.heads.original import MLP, TEXT, write_llava
from tests.runtime.installation.hugging_face import TAKES_FEATURES
from tests.runtime.installation.original import ClipWrapper, Llava, Tinychat, Vila
from trtower import VisionTower
from trtower.bundle.manifest import GRAPH, MANIFEST
from trtower.errors import BackendError, ConfigError
from trtower.spec import BatchProfile
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.plan.parsing import find_parsers

pytestmark = pytest.mark.usefixtures("one_thread")

THROUGH_PYTORCH = 1e-6
"""Relative error of PyTorch's FP32 on the graph, which is a second reading of it."""

EXACT = 2e-5
"""Of features around 4, in FP32: kernels sum in another order."""


def export(source: Path, out: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {"head": "projector", "precision": "fp32", "flavour": "none", "check": False}
    profiles = (BatchProfile(min=1, opt=2, max=4),)
    return export_tower(str(source), out, ExportOptions(**defaults | options, profiles=profiles)).path


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("projected")

    @cache
    def of(name: str, precision: str = "fp32") -> Path:
        make(name).save_pretrained(root / name)
        return export(root / name, root / f"{name}-{precision}", precision=precision)

    return of


@torch.no_grad()
def features(model: Any, name: str) -> list[Tensor]:
    """Return what the model's method returns, however it is packed."""
    kind, given = KINDS[name], {"pixel_values": pixels()}
    if kind.tiles:
        given = {"pixel_values": pixels()[:, None].repeat(1, 3, 1, 1, 1)}
        given["image_sizes"] = torch.tensor([[IMAGE_SIZE, 2 * IMAGE_SIZE]] * 3)
    if kind.nested:
        given = {"pixel_values": pixels()[:, None]}
    found = model.model.get_image_features(**given)
    return list(getattr(found, "pooler_output", found))


@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_the_model_and_both_modules_come_back(name: str, bundles: Any) -> None:
    model, before_state = make(name).requires_grad_(requires_grad=True), make(name).state_dict()  # as it is loaded
    expected, projector = features(model, name), dict(model.named_modules())
    assert find_parsers(bundles(name) / GRAPH).unknown == ()  # TensorRT parses all that a projector adds
    second: Any = VisionTower.load(bundles(name), "torch-cpu")(pixels())
    answers = models.features(make(name), name, pixels())
    assert float((second - answers).norm() / answers.norm()) <= THROUGH_PYTORCH
    with trtower.install(model, bundles(name)) as installed:
        assert " and model." in repr(installed)
        calls: list[int] = []
        installed.tower.on_batch = lambda report: calls.append(report.batch)
        found = features(model, name)
        assert sum(calls) == len(pixels()) * (3 if KINDS[name].tiles else 1)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= EXACT
        state = model.state_dict()
        assert state.keys() == before_state.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in before_state.items())
    assert dict(model.named_modules()) == projector
    assert all(torch.equal(one, other) for one, other in zip(features(model, name), expected, strict=True))


def test_gradient_that_reaches_a_replaced_projector_is_not_lost(bundles: Any) -> None:
    model = make("llava")
    with trtower.install(model, bundles("llava")):
        projector_of(model).requires_grad_(requires_grad=True)
        given = model.model.get_image_features(pixel_values=pixels())
        with pytest.raises(BackendError, match="a gradient reached the vision tower"):
            torch.stack(list(getattr(given, "pooler_output", given))).sum().backward()


def test_other_layers_or_tokens_than_at_installation_are_refused(bundles: Any) -> None:
    """Another choice is an argument of the model's method, or a change of its config, and would give old features."""
    model = make("llava-two-layers")
    with trtower.install(model, bundles("llava-two-layers")), torch.no_grad():
        get = model.model.get_image_features
        for changes in (
            {"vision_feature_layer": [-1, -3]},
            {"vision_feature_layer": -3},
            {"vision_feature_layer": [-3, -3]},
            {"vision_feature_select_strategy": "full"},
        ):
            with pytest.raises(ConfigError, match=r"got states .* but the engine projects \(2, 4\)"):
                get(pixel_values=pixels(), **changes)
        model.config.vision_feature_select_strategy = "full"
        with pytest.raises(ConfigError, match="multi_modal_projector got states"):
            get(pixel_values=pixels())


def test_projector_of_another_activation_is_refused(bundles: Any) -> None:
    model = make("llava")
    model.config.projector_hidden_act = "quick_gelu"
    with pytest.raises(ConfigError, match=r'made of a projector with projector_hidden_act="gelu"; .* has "quick_gelu"'):
        trtower.install(model, bundles("llava"))


def test_copy_that_peft_runs_is_replaced_and_comes_back(bundles: Any) -> None:
    peft = pytest.importorskip("peft")
    model = make("llava")
    expected = features(model, "llava")
    config = peft.LoraConfig(
        target_modules=["q_proj"], exclude_modules=".*vision_tower.*", modules_to_save=["multi_modal_projector"]
    )
    wrapped = peft.get_peft_model(model, config).eval().requires_grad_(requires_grad=False)
    trtower.install(wrapped, bundles("llava"))
    assert all((a - b).abs().max() <= EXACT for a, b in zip(features(model, "llava"), expected, strict=True))
    trtower.uninstall(wrapped)
    assert all(torch.equal(a, b) for a, b in zip(features(model, "llava"), expected, strict=True))


@pytest.mark.parametrize("deleted", [True, False])
def test_tower_comes_back_even_if_the_projector_was_exchanged(
    deleted: bool, bundles: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llava")
    tower = model.model.vision_tower
    trtower.install(model, bundles("llava"))
    other = nn.Linear(models.WIDTH, TEXT_WIDTH)
    del model.model.multi_modal_projector
    if not deleted:
        model.model.multi_modal_projector = other
    trtower.uninstall(model)
    assert model.model.vision_tower is tower
    assert getattr(model.model, "multi_modal_projector", other) is other
    assert "multi_modal_projector is no longer the one that the bundle replaced" in caplog.text


def test_method_that_the_user_patched_since_stays(bundles: Any) -> None:
    model = make("llava")
    trtower.install(model, bundles("llava"))
    mine = model.model.get_image_features = lambda **_: None
    trtower.uninstall(model)
    assert model.model.get_image_features is mine


def test_model_that_computes_between_tower_and_projector_is_refused_and_unchanged(bundles: Any) -> None:
    model = make("llava")
    modules = dict(model.named_modules())

    def scaled(self: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
        states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        return self.multi_modal_projector(states * 1.0)

    model.model.get_image_features = scaled.__get__(model.model)
    vars(model)["get_image_features"] = scaled.__get__(model.model)
    with pytest.raises(ConfigError, match=r"does not get from an image to its features .*: this model computes mul"):
        trtower.install(model, bundles("llava"))
    assert dict(model.named_modules()) == modules
    assert all(each.numel() for each in projector_of(model).parameters())


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_weights_of_tower_and_projector_are_freed(name: str, bundles: Any) -> None:
    model = make(name)
    projector = sum(each.nbytes for each in model.model.multi_modal_projector.parameters())
    tower = sum(each.nbytes for each in model.model.vision_tower.parameters())
    installed = trtower.install(model, bundles(name))
    assert installed.freed == tower + projector
    assert not any(each.numel() for each in model.model.multi_modal_projector.parameters())
    trtower.uninstall(model)


def test_model_in_half_precision_is_served_in_half_precision(bundles: Any) -> None:
    model = make("llava")
    exact = torch.stack(features(model, "llava"))
    model.half()
    with trtower.install(model, bundles("llava", "fp16")):
        found = model.model.get_image_features(pixel_values=pixels().half())
        found = torch.stack(list(getattr(found, "pooler_output", found)))
        assert found.dtype == torch.float16
        assert (found.float() - exact).abs().max() < 0.02


@pytest.mark.skipif(not TAKES_FEATURES, reason="this transformers has no mm_encoder_outputs")
def test_encode_for_takes_the_projected_features(bundles: Any) -> None:
    model = make("llava")
    expected = features(model, "llava")
    with trtower.install(model, bundles("llava")):
        encoded = trtower.encode_for(model, pixels())["image"].pooler_output
    assert all((one - other).abs().max() <= EXACT for one, other in zip(encoded, expected, strict=True))


@pytest.mark.skipif(not TAKES_FEATURES, reason="this transformers has no mm_encoder_outputs")
def test_generate_takes_the_features_of_the_tower_itself(bundles: Any) -> None:
    model, tower = make("llava"), trtower.VisionTower.load(bundles("llava"))
    ids = torch.tensor([[1, 5, *[110] * models.NUM_PATCHES, 7]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    scores = {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**given, **scores, pixel_values=pixels(1))
    listed: Any = list(tower(pixels(1)))
    encoded = BaseModelOutputWithPooling(pooler_output=listed)
    found = model.generate(**given, **scores, mm_encoder_outputs={"image": encoded})
    assert torch.equal(found.sequences, expected.sequences)
    assert (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max() <= 10 * EXACT


def projector_of(model: Any) -> Any:
    return model.model.multi_modal_projector


def test_projector_with_other_weights_is_refused(bundles: Any) -> None:
    model = make("llava")
    projector_of(model).linear_1.bias.add_(0.01)
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=r"multi_modal_projector of this model has other weights than the one inside"):
        trtower.install(model, bundles("llava"))
    assert dict(model.named_modules()) == before
    source = json.loads((bundles("llava") / MANIFEST).read_text())["source"]["checkpoint"]
    ways = {"my/tuned": "trtower export my/tuned --head projector", source: "was changed after it was loaded"}
    for loaded_from, way_out in ways.items():
        model.config._name_or_path = loaded_from
        with pytest.raises(ConfigError, match=way_out):
            trtower.install(model, bundles("llava"))


def test_quantised_projector_is_refused(bundles: Any) -> None:
    model = make("llava")
    weight = torch.ones(TEXT_WIDTH, WIDTH, dtype=torch.int8)
    projector_of(model).linear_1.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ConfigError, match=r"holds weights in (float32 and int8), so it is at least partly quantised"):
        trtower.install(model, bundles("llava"))


def test_projector_whose_code_was_changed_is_refused(bundles: Any) -> None:
    model = make("llava")
    projector: Any = projector_of(model)
    before = projector.forward
    projector.forward = lambda states: before(states).flip(-1)
    with pytest.raises(ConfigError, match=r"multi_modal_projector of this model and .* differ on the same image"):
        trtower.install(model, bundles("llava"))


def test_bundle_of_a_release_that_divides_is_refused_where_features_are_not_divided(
    bundles: Any, tmp_path: Path
) -> None:
    """PaliGemma of transformers 4.57 divides, 5.23 does not; the graphs differ, and so would the answers."""
    import shutil

    other = shutil.copytree(bundles("paligemma"), tmp_path / "other")
    manifest = json.loads((other / MANIFEST).read_text())
    divides = manifest["spec"]["head"]["divisor"] != 1.0
    manifest["spec"]["head"]["divisor"] = 1.0 if divides else TEXT_WIDTH**0.5
    (other / MANIFEST).write_text(json.dumps(manifest))
    message = (
        r"of this model divides by 6\.9282 what .* that does not divide"
        if divides
        else (r"of this model does not divide what .* that divides by 6\.9282")
    )
    with pytest.raises(ConfigError, match=message):
        trtower.install(make("paligemma"), other)


def test_bundle_that_reads_other_layers_or_tokens_is_refused(bundles: Any) -> None:
    model = make("llava")
    model.config.vision_feature_layer = -1
    with pytest.raises(ConfigError, match=r"this model reads vision_feature_layer=-1, but the projector .* reads"):
        trtower.install(model, bundles("llava"))
    model.config.vision_feature_layer, model.config.vision_feature_select_strategy = -2, "full"
    with pytest.raises(ConfigError, match=r"returns \(17, 48\) for an image; .* ends with the projector"):
        trtower.install(model, bundles("llava"))


def test_model_without_such_a_projector_is_refused(bundles: Any) -> None:
    model = make("llava")
    model.model.other = model.model.multi_modal_projector
    del model.model.multi_modal_projector
    with pytest.raises(ConfigError, match=r"has no multi_modal_projector, which the projector"):
        trtower.install(model, bundles("llava"))


def test_training_a_projector_that_was_replaced_is_refused(bundles: Any) -> None:
    model = make("llava")
    projector_of(model).train()
    with pytest.raises(ConfigError, match=r"multi_modal_projector is in training mode"):
        trtower.install(model, bundles("llava"))
    projector_of(model).eval()
    with trtower.install(model, bundles("llava")):
        projector_of(model).train()
        with pytest.raises(BackendError, match=r"multi_modal_projector is compiled and cannot be trained"):
            features(model, "llava")
        projector_of(model).eval()


def test_replaced_projector_refuses_other_states_and_what_needs_numbers(bundles: Any) -> None:
    model = make("llava")
    with trtower.install(model, bundles("llava")), torch.no_grad():
        with pytest.raises(ConfigError, match="got a Tensor that its compiled tower did not return"):
            projector_of(model)(torch.zeros(1, 16, WIDTH))
        states = model.model.vision_tower(pixels(), output_hidden_states=True).hidden_states[-2]
        assert states.shape == (3, models.NUM_PATCHES + 1, models.WIDTH)
        assert projector_of(model)(states[:, 1:].contiguous().to(torch.float32)).shape == (
            3,
            models.NUM_PATCHES,
            TEXT_WIDTH,
        )
        with pytest.raises(ConfigError, match="computes both in one engine"):
            torch.ones(1) * states
        for needs in ("half", "mean", "relu"):
            with pytest.raises(ConfigError, match="computes both in one engine"):
                getattr(states, needs)()
        for picks in (0, slice(1, 2), (torch.tensor([True, False, True]),)):
            with pytest.raises(ConfigError, match="picks among the images"):
                states[picks]
        again = model.model.vision_tower(pixels(), output_hidden_states=True).hidden_states[-2]
        assert len(projector_of(model)(torch.cat([states, again])[:, 1:])) == 6
        with pytest.raises(ConfigError, match="got 2 rows for 3 images"):
            projector_of(model)(states.split(2)[0])
        with pytest.raises(ConfigError, match="mixes hidden states of several images"):
            torch.cat([states, again], dim=-1)
        with pytest.raises(ConfigError, match="last_hidden_state was requested"):
            len(model.model.vision_tower(pixels()).last_hidden_state)


def test_model_may_be_compiled_before_and_after(bundles: Any) -> None:
    model = make("llava")
    ids = torch.tensor([[1, 5, *[110] * models.NUM_PATCHES, 7]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(1)}
    with torch.no_grad():
        expected = model(**given).logits
        compiled: Any = torch.compile(model, backend="eager")
        assert (compiled(**given).logits - expected).abs().max() <= 10 * EXACT
        with trtower.install(model, bundles("llava")) as installed:
            calls: list[int] = []
            installed.tower.on_batch = lambda report: calls.append(report.batch)
            assert (compiled(**given).logits - expected).abs().max() <= 10 * EXACT
            afresh: Any = torch.compile(model, backend="eager")
            assert (afresh(**given).logits - expected).abs().max() <= 10 * EXACT
            assert calls == [1, 1]
        assert "get_image_features" not in vars(model.model)
        assert (compiled(**given).logits - expected).abs().max() <= 10 * EXACT
    torch.compiler.reset()


def test_embedding_is_refused(bundles: Any, tmp_path: Path) -> None:
    siglip = tmp_path / "siglip"
    make("llava_onevision").model.vision_tower.save_pretrained(siglip)
    bundle = export(siglip, tmp_path / "b", head="embedding")
    with pytest.raises(ConfigError, match=r"returns one vector for each image, but models read hidden states"):
        trtower.install(make("llava_onevision"), bundle)


@torch.no_grad()
def test_division_is_undone_exactly_in_half_precision(bundles: Any) -> None:
    """A model in BF16 shows the number only roughly; the features must not be scaled by what it shows."""
    model = make("paligemma").bfloat16()
    with trtower.install(model, bundles("paligemma")) as installed:
        found = model.model.get_image_features(pixel_values=pixels().bfloat16())
        found = getattr(found, "pooler_output", found).float()
        exact = installed.tower(pixels().bfloat16().float())
    assert float(((found * exact).sum() / exact.square().sum() - 1).abs()) < 1e-3


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write an original LLaVA; return the folder of its tower, and the bundle."""
    root = tmp_path_factory.mktemp("original")
    folder = write_llava(root / "llava", root / "clip", MLP, mm_projector_type="mlp2x_gelu")
    return root / "clip", export(folder, root / "b")


def original_model(kind: Any, clip: Path, feature: str = "patch") -> Any:
    """Make a model as LLaVA, tinychat or VILA make it, with the weights of `original`."""
    config = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature=feature)
    model = kind(ClipWrapper(str(clip), config), config).eval()
    holder = model if kind is Vila else model.model
    holder.mm_projector = nn.Sequential(nn.Linear(WIDTH, TEXT), nn.GELU(), nn.Linear(TEXT, TEXT)).eval()
    holder.mm_projector.load_state_dict(MLP)
    return model


@pytest.mark.parametrize("kind", [Llava, Tinychat, Vila])
@torch.no_grad()
def test_models_of_llava_tinychat_and_vila_are_served_and_brought_back(kind: Any, original: tuple[Path, Path]) -> None:
    clip, bundle = original
    model, images = original_model(kind, clip), torch.randn(2, 3, SMALL, SMALL)
    holder = model if kind is Vila else model.model
    projector = holder.mm_projector
    expected = model.encode_images(images)
    with trtower.install(model, bundle):
        assert (model.encode_images(images) - expected).abs().max() <= EXACT
        several = torch.cat(model.get_vision_tower()(list(images)))  # LLaVA's loop over pictures of different sizes
        assert (holder.mm_projector(several) - expected).abs().max() <= EXACT
        assert "computed by the tower's engine" in str(model)
    assert holder.mm_projector is projector
    assert torch.equal(model.encode_images(images), expected)


@torch.no_grad()
def test_tower_of_llava_may_have_another_dtype_than_its_model(original: tuple[Path, Path]) -> None:
    clip, bundle = original
    model, images = original_model(Llava, clip), torch.randn(2, 3, SMALL, SMALL).half()
    model.llm.half()
    model.model.mm_projector.half()  # LLaVA's loader leaves the tower in FP32 on a CPU
    expected = model.encode_images(images)
    with trtower.install(model, bundle):
        found = model.encode_images(images)
    assert found.dtype == torch.float16
    assert (found.float() - expected.float()).abs().max() <= 1e-2


@torch.no_grad()
def test_cls_token_is_read_by_llavas_wrapper_if_the_config_says_so(tmp_path: Path) -> None:
    feature = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "cls_patch"}
    bundle = export(write_llava(tmp_path / "llava", tmp_path / "clip", MLP, **feature), tmp_path / "b")
    model, images = original_model(Llava, tmp_path / "clip", "cls_patch"), torch.randn(1, 3, SMALL, SMALL)
    expected = model.encode_images(images)
    with trtower.install(model, bundle):
        assert (model.encode_images(images) - expected).abs().max() <= EXACT
    without_cls = original_model(Llava, tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"reads select_layer=-2.*but the .*cls_patch tokens"):
        trtower.install(without_cls, bundle)
