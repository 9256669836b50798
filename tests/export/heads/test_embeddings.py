"""Embeddings: one vector per image, as the pooling of transformers' own models makes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from tests.conftest import IMAGE_SIZE, MODELS, WIDTH, make_model
from tests.export.heads.models import make as make_projected
from trtower import VisionTower
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH
from trtower.errors import CheckpointError
from trtower.head import HeadSpec
from trtower.parity.verify import verify
from trtower.spec import BatchProfile
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.families.siglip2 import patchify
from trtower_export.graph.cost import measure_uncut
from trtower_export.graph.reference import UncutTower
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.plan.parsing import find_parsers

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECTED = {"clip": "CLIP", "metaclip_2": "MetaClip2"}
POOLED = ("siglip", "siglip2", "dinov2", "dinov2_with_registers", "dinov3_vit", "aimv2", "aimv2-native")
EMBEDDING = 24
BATCH = (BatchProfile(min=1, opt=2, max=4),)
EXPORTED = ("clip", "siglip", "aimv2")
THROUGH_PYTORCH = 1e-6
"""Relative error of PyTorch's FP32, also on the graph."""

THROUGH_THE_GRAPH = 1e-5
"""Largest error of ONNX Runtime's FP32, relative to the largest number of a vector."""


def make(name: str) -> Any:
    if name not in PROJECTED:
        return make_model(name).requires_grad_(requires_grad=False)
    kind = PROJECTED[name]
    config = getattr(transformers, f"{kind}VisionConfig")(**MODELS[name][1], projection_dim=EMBEDDING)
    model = getattr(transformers, f"{kind}VisionModelWithProjection")(config)
    tower = make_model(name).state_dict()
    model.vision_model.load_state_dict({key.removeprefix("vision_model."): each for key, each in tower.items()})
    torch.manual_seed(1)
    torch.nn.init.normal_(model.visual_projection.weight, std=WIDTH**-0.5)
    return model.eval().requires_grad_(requires_grad=False)


def pixels(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def run(model: Any, name: str) -> Any:
    if name == "siglip2":
        patches = patchify(pixels(), model.config.patch_size)
        mask, shapes = torch.ones(patches.shape[:2], dtype=torch.int32), torch.full((len(patches), 2), 3)
        return model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    return model(pixels())


def embed(model: Any, name: str) -> Tensor:
    output = run(model, name)
    vectors: Tensor = output.image_embeds if name in PROJECTED else output.pooler_output
    return vectors


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedding-models")
    for name in (*PROJECTED, *POOLED):
        make(name).save_pretrained(root / name)
    return {name: root / name for name in (*PROJECTED, *POOLED)}


def load(source: Path, **options: Any) -> UncutTower:
    checkpoint = open_checkpoint(str(source))
    return UncutTower.load(checkpoint, describe_tower(checkpoint, ExportOptions(head="embedding", **options)))


def export(source: Path, out: Path, **options: Any) -> Bundle:
    defaults: dict[str, Any] = {
        "head": "embedding",
        "precision": "fp32",
        "flavour": "none",
        "check": False,
        "profiles": BATCH,
    }
    return export_tower(str(source), out, ExportOptions(**defaults | options))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [*PROJECTED, *POOLED])
@torch.no_grad()
def test_cut_tower_and_reference_equal_the_model(name: str, models: dict[str, Path]) -> None:
    """Mostly bit for bit. On some processors PyTorch's sums depend on where in memory the weights are."""
    expected, uncut = embed(make(name), name), load(models[name])
    assert error(uncut.cut()(pixels()), expected) <= THROUGH_PYTORCH
    assert error(uncut.read(uncut.states("drawn", pixels())), expected) <= THROUGH_PYTORCH
    normalised = load(models[name], normalize=True).cut()(pixels())
    assert error(normalised, functional.normalize(expected, dim=-1)) <= THROUGH_PYTORCH


@pytest.mark.parametrize("name", EXPORTED)
def test_bundle_returns_the_vector_of_the_model(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    expected = embed(make(name), name)
    bundle = export(models[name], tmp_path / "b")
    tower = VisionTower.load(bundle.path, "onnxruntime-cpu")
    found = tower(pixels())
    assert isinstance(found, Tensor)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < THROUGH_THE_GRAPH
    second: Any = VisionTower.load(bundle.path, "torch-cpu")(pixels())
    assert error(second, expected) <= THROUGH_PYTORCH
    assert (tower.hidden_size, tower.num_tokens, tower.num_patches) == (expected.shape[-1], 1, 9)
    assert tower.dummy_feature.shape == (1, expected.shape[-1])
    assert [each.shape for each in tower(list(pixels()))] == [(1, expected.shape[-1])] * 3
    out = torch.empty_like(expected)
    assert tower(pixels(), out).data_ptr() == out.data_ptr()
    assert tower(pixels()[None]).shape == (1, *expected.shape)
    assert bundle.manifest.output.name == "image_embeds"


def test_half_precision_builds_a_plan_and_passes_check_and_verify(models: dict[str, Path], tmp_path: Path) -> None:
    options = {"precision": "fp16", "flavour": "tensorrt-rtx", "check": True, "normalize": True}
    bundle = export(models["siglip"], tmp_path / "b", **options)
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
    assert bundle.manifest.plans
    assert find_parsers(bundle.path / GRAPH).unknown == ()
    assert verify(bundle, backend="onnxruntime-cpu").passed
    vectors = VisionTower.load(bundle.path, "onnxruntime-cpu")(pixels())
    assert isinstance(vectors, Tensor)
    torch.testing.assert_close(vectors.float().norm(dim=-1), torch.ones(3), atol=2e-3, rtol=0)


@torch.no_grad()
def test_normalised_vectors_survive_numbers_whose_squares_overflow(tmp_path: Path) -> None:
    """FP16 ends at 65504, and the squares of 300 do not fit."""
    model = make("dinov2")
    model.layernorm.weight.mul_(300)
    model.layernorm.bias.mul_(300)
    model.save_pretrained(tmp_path)
    vectors = load(tmp_path, normalize=True).cut().half()(pixels().half())
    torch.testing.assert_close(vectors.float().norm(dim=-1), torch.ones(3), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "dinov3_vit"])
@torch.no_grad()
def test_cls_mean_adds_the_mean_of_the_patches_without_registers(name: str, models: dict[str, Path]) -> None:
    state, uncut = run(make(name), name).last_hidden_state, load(models[name], pool="cls_mean")
    expected = torch.cat([state[:, 0], state[:, state.shape[1] - 9 :].mean(dim=1)], dim=-1)
    assert torch.equal(uncut.cut()(pixels()), expected)
    assert uncut.spec.head
    assert (uncut.spec.head.width, uncut.spec.head.pool) == (2 * WIDTH, "cls_mean")
    assert "embedding by CLS token and the mean of the patches, a vector of" in uncut.spec.head.describe()


@torch.no_grad()
def test_whole_clip_and_aimv2_models_are_projected(tmp_path: Path) -> None:
    for kind, name, text in (("CLIP", "clip", "CLIPTextConfig"), ("Aimv2", "aimv2", "Aimv2TextConfig")):
        vision = getattr(transformers, f"{kind}VisionConfig")(**MODELS[name][1])
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision.to_dict(),
            text_config=getattr(transformers, text)(**small, vocab_size=99).to_dict(),
            projection_dim=EMBEDDING,
        )
        torch.manual_seed(2)
        model = getattr(transformers, f"{kind}Model")(config).eval().requires_grad_(requires_grad=False)
        model.save_pretrained(tmp_path / name)
        expected = model.get_image_features(pixel_values=pixels())
        expected = getattr(expected, "pooler_output", expected)
        assert torch.equal(load(tmp_path / name).cut()(pixels()), expected)


def test_every_layer_is_kept_and_the_last_ones_weights_count(models: dict[str, Path]) -> None:
    embedding, checkpoint = load(models["clip"]), open_checkpoint(str(models["clip"]))
    states = UncutTower.load(checkpoint, checkpoint.spec())
    assert [len(each.cut().layers) for each in (embedding, states)] == [4, 3]
    assert measure_uncut(embedding).parameters - measure_uncut(states).parameters == EMBEDDING * WIDTH
    assert embedding.weights_sha256() != states.weights_sha256()  # of the last layer and of post_layernorm
    expected = HeadSpec(kind="embedding", name="CLS projection", width=EMBEDDING, attribute="visual_projection")
    assert embedding.spec.head == expected


def test_projection_that_no_head_reads_is_refused(tmp_path: Path) -> None:
    """VisionTextDualEncoder projects what its SigLIP or DINOv2 pools."""
    text = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.VisionTextDualEncoderConfig(
        vision_config=make("dinov2").config.to_dict(),
        text_config=text | {"num_attention_heads": 2, "vocab_size": 99},
        projection_dim=20,
    )
    transformers.VisionTextDualEncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the model projects the pooled vector with visual_projection\.weight"):
        load(tmp_path)


def test_models_without_a_pooled_embedding_are_refused(tmp_path: Path) -> None:
    make_model("siglip", vision_use_head=False).save_pretrained(tmp_path / "siglip")
    with pytest.raises(CheckpointError, match="vision_use_head is false, so it has no pooling head and no embedding"):
        load(tmp_path / "siglip")
    make_model("eva_clip").save_pretrained(tmp_path / "eva")
    with pytest.raises(CheckpointError, match="blip_2_vision_model, has no pooled embedding that trtower exports"):
        load(tmp_path / "eva")
    make_model("clip").save_pretrained(tmp_path / "clip")
    make_projected("llava").save_pretrained(tmp_path / "llava")  # whose tower is a CLIP without one
    for name in ("clip", "llava"):
        with pytest.raises(CheckpointError, match="holds no visual_projection, the weights of the CLS projection"):
            describe_tower(open_checkpoint(str(tmp_path / name)), ExportOptions(head="embedding"))


def test_siglip_without_the_weights_of_its_pooling_head_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "cut"
    make("siglip").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "head." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(str(folder)).load_model(open_checkpoint(str(folder)).spec(-2))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of a SiglipVisionModel"):
        load(folder)
