"""Every form of a tower is recognised, and read with its weights at the layer that its model reads."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import IMAGE_SIZE, IS_OLD, MODELS, NUM_LAYERS, POSITIONS, make_model
from trtower.bundle.bundle import Bundle
from trtower.errors import CheckpointError, ConfigError, TrtowerError
from trtower.layer_codes import LAST as LAST_STATE
from trtower.reading import READS_LAST, TRAINED
from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trtower_export.checkpoint.layout import Layout
from trtower_export.checkpoint.layouts import _read_hf_layer, from_recipe
from trtower_export.graph.truncate import truncate
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.recipes import find_recipe

LAST = NUM_LAYERS + 1
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
QWEN = {"model_type": "qwen2", "num_key_value_heads": 1} | TEXT
GEMMA = {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16} | TEXT
COHERE = {"model_type": "cohere2", "num_key_value_heads": 1, "eos_token_id": 2} | TEXT
OPT = {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32} | TEXT
QFORMER = {"encoder_hidden_size": 64} | TEXT
LLAMA = {"model_type": "llama"} | TEXT


def tower_of(model: nn.Module) -> nn.Module:
    """Find the vision model in a transformers model."""
    for name in ("model.vision_tower", "vision_tower", "model.vision_model", "vision_model"):
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    raise AssertionError(type(model))


def states(model: nn.Module, inner: Any) -> dict[str, torch.Tensor]:
    """Return a small tower's state dict under the names that a larger model uses for the same tower."""
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    return {name: tensors[name.removeprefix("vision_model.")] for name in inner.state_dict()}


def save_composite(kind: str, family: str, folder: Path, **options: Any) -> nn.Module:
    """Write a small transformers model with a small tower in it; return the tower as it was drawn."""
    vision = make_model(family)
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(vision_config=vision.config.to_dict(), **options)
    name = {"CLIP": "CLIPModel", "Siglip": "SiglipModel", "Siglip2": "Siglip2Model"}
    model = getattr(transformers, name.get(kind, f"{kind}ForConditionalGeneration"))(config)
    inner = tower_of(model)
    inner.load_state_dict(states(vision, inner))
    model.save_pretrained(folder)
    return vision


def assert_same_tower(checkpoint: Checkpoint, vision: nn.Module, layers: tuple[int, ...]) -> None:
    """Require that a checkpoint's cut tower returns exactly the states of the tower that was put in."""
    spec = checkpoint.spec()
    assert spec.layers == layers
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        features = truncate(checkpoint.load_model(spec), checkpoint.family, spec)(pixel_values)
        expected = checkpoint.family.read_states(vision, pixel_values)
    assert torch.equal(features, torch.cat([expected[layer] for layer in layers], dim=-1))


COMPOSITES: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...], str]] = {
    # class, tower, options of the config, hidden states read, tokens kept
    "llava": ("Llava", "clip", {"text_config": LLAMA}, (3,), "patch"),
    "llava-layer": ("Llava", "clip", {"text_config": LLAMA, "vision_feature_layer": 1}, (1,), "patch"),
    "llava-layers": ("Llava", "clip", {"text_config": LLAMA, "vision_feature_layer": [-1, 1]}, (4, 1), "patch"),
    "llava-full": (
        "Llava",
        "clip",
        {"text_config": LLAMA, "vision_feature_select_strategy": "full"},
        (3,),
        "cls_patch",
    ),
    "llava-next": ("LlavaNext", "clip", {"text_config": LLAMA, "image_grid_pinpoints": [[84, 84]]}, (3,), "patch"),
    "vipllava": ("VipLlava", "clip", {"text_config": LLAMA, "vision_feature_layers": [-2, -4, 1]}, (3, 1, 1), "patch"),
    "llava-onevision": (
        "LlavaOnevision",
        "siglip",
        {"text_config": QWEN, "image_grid_pinpoints": [[84, 84]]},
        (4,),
        "cls_patch",
    ),
    "paligemma": ("PaliGemma", "siglip", {"text_config": GEMMA, "projection_dim": 32}, (LAST,), "cls_patch"),
    "llava-next-video": (
        "LlavaNextVideo",
        "clip",
        {"text_config": LLAMA, "image_grid_pinpoints": [[84, 84]]},
        (3,),
        "patch",
    ),
    "aya-vision": ("AyaVision", "siglip", {"text_config": COHERE}, (4,), "cls_patch"),
    "cohere2-vision": ("Cohere2Vision", "siglip", {"text_config": COHERE}, (LAST,), "cls_patch"),
    "gemma3": ("Gemma3", "siglip", {"text_config": GEMMA | {"model_type": "gemma3_text"}}, (LAST,), "cls_patch"),
    "blip-2": ("Blip2", "eva_clip", {"text_config": OPT, "qformer_config": QFORMER}, (LAST,), "cls_patch"),
    "idefics3": ("Idefics3", "idefics3_vision", {"text_config": LLAMA}, (LAST,), "cls_patch"),
    "smolvlm": ("SmolVLM", "smolvlm_vision", {"text_config": LLAMA}, (LAST,), "cls_patch"),
    "internvl": ("InternVL", "internvl_vision", {"text_config": QWEN}, (LAST,), "patch"),
    "internvl-layer": (
        "InternVL",
        "internvl_vision",
        {"text_config": QWEN, "vision_feature_layer": -2},
        (3,),
        "patch",
    ),
    "clip": ("CLIP", "clip", {"text_config": TEXT}, (3,), "patch"),
    "siglip": ("Siglip", "siglip", {"text_config": TEXT}, (3,), "patch"),
    "siglip2": ("Siglip2", "siglip2", {"text_config": TEXT}, (3,), "patch"),
}


@pytest.mark.parametrize("name", [name for name, kind in COMPOSITES.items() if kind[1] in {*MODELS, "internvl_vision"}])
def test_transformers_model_is_read_at_its_own_layer(name: str, tmp_path: Path) -> None:
    kind, family, options, layers, feature = COMPOSITES[name]
    vision = save_composite(kind, family, tmp_path, **options)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.spec().select_feature == feature
    assert_same_tower(checkpoint, vision, layers)


@pytest.mark.skipif(IS_OLD, reason=POSITIONS)
def test_tower_that_older_releases_named_like_its_model_is_read(tmp_path: Path) -> None:
    vision = save_composite("Idefics3", "idefics3_vision", tmp_path, text_config=LLAMA)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["model_type"] = "idefics3"
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.model_type == "idefics3_vision"
    assert_same_tower(checkpoint, vision, (LAST,))


@pytest.mark.parametrize("name", MODELS)
def test_plain_vision_model_is_read_whole(name: str, tmp_path: Path) -> None:
    vision = make_model(name)
    vision.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_same_tower(checkpoint, vision, (NUM_LAYERS - 1,))
    assert_same_tower(replace(checkpoint, layout=replace(checkpoint.layout, select_layer=LAST_STATE)), vision, (LAST,))


@pytest.mark.parametrize(
    "root", ["vision_tower.vision_model.", "model.vision_tower.", "vision_tower.", "model.vision_tower.vision_model."]
)
def test_prefixes_of_every_transformers_release_are_read(root: str, tmp_path: Path) -> None:
    vision = save_composite("Llava", "clip", tmp_path, text_config=LLAMA)
    path = next(tmp_path.glob("*.safetensors"))
    tensors = {
        re.sub(r"^.*?vision_tower\.(vision_model\.)?", root, name): tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    assert_same_tower(open_checkpoint(str(tmp_path)), vision, (3,))


def test_requested_layer_overrides_the_checkpoints(tmp_path: Path) -> None:
    save_composite("Llava", "clip", tmp_path, text_config=LLAMA)
    spec = open_checkpoint(str(tmp_path)).spec([1, 2], "cls_patch")
    assert (spec.layers, spec.select_feature) == ((1, 2), "cls_patch")


def test_misspelt_feature_is_not_blamed_on_the_checkpoint(tmp_path: Path) -> None:
    save_composite("Llava", "clip", tmp_path, text_config=LLAMA)
    with pytest.raises(ConfigError, match=r"^unknown select_feature 'cls'; choose patch, cls_patch"):
        open_checkpoint(str(tmp_path)).spec(select_feature="cls")


def test_strategy_that_drops_a_patch_is_refused(tmp_path: Path) -> None:
    save_composite("Llava", "siglip", tmp_path, text_config=LLAMA)
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"strategy='default' drops the first token.*--select-feature cls_patch"):
        checkpoint.spec()
    assert checkpoint.spec(select_feature="cls_patch").num_tokens == 9


def layout_of_so400m() -> Layout:
    recipe = find_recipe("siglip-so400m-patch14-224")
    assert recipe is not None
    return from_recipe(recipe)


@pytest.mark.parametrize("model_type", READS_LAST)
def test_model_that_reads_its_last_state_does_so_whatever_its_config_says(model_type: str) -> None:
    config = SimpleNamespace(model_type=model_type, vision_feature_layer=-2)
    layout = _read_hf_layer(layout_of_so400m(), config, "config.json")
    assert (layout.select_layer, layout.select_feature) == ("last_hidden_state", "cls_patch")


def test_inherited_default_is_ignored_for_a_model_that_chooses_its_own_layers() -> None:
    config = SimpleNamespace(model_type="granite4_vision", vision_feature_layer=-2)
    layout = _read_hf_layer(layout_of_so400m(), config, "config.json")
    assert (layout.select_layer, layout.said_as) == (None, "vision_feature_layer")


def test_registers_that_eager_code_keeps_need_a_choice(tmp_path: Path) -> None:
    save_composite("Llava", "dinov2_with_registers", tmp_path, text_config=LLAMA)
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"drops the first token, which in a \S+ tower is one of 4 prefix"):
        checkpoint.spec()
    assert checkpoint.spec(select_feature="patch").first_token("patch") == 4


def test_unrelated_folder_called_vision_tower_is_ignored(tmp_path: Path) -> None:
    vision = save_composite("Llava", "clip", tmp_path, text_config=LLAMA, vision_feature_layer=1)
    make_model("clip-gelu").save_pretrained(tmp_path / "vision_tower")
    assert_same_tower(open_checkpoint(str(tmp_path)), vision, (1,))


def test_missing_vision_config_is_not_replaced_by_a_default(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "hidden_size": 64}))
    with pytest.raises(CheckpointError, match="has no vision_config"):
        open_checkpoint(str(tmp_path), random_weights=True)


@pytest.mark.parametrize("kernels", ["someone/kernels", "flash_attention_2"])
def test_config_cannot_choose_the_code_of_its_attention(
    checkpoints: dict[str, Path], tmp_path: Path, kernels: str
) -> None:
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "c"))
    edit(folder, attn_implementation=kernels, _attn_implementation=kernels)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config._attn_implementation == "sdpa"
    assert_same_tower(checkpoint, make_model("clip"), (3,))


def test_config_cannot_choose_a_quantiser(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "c"))
    edit(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert_same_tower(open_checkpoint(str(folder)), make_model("clip"), (3,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_hidden_layers", value) for value in (0, -1, "4", None, [4], 2.5)),
        *(("num_attention_heads", value) for value in (0, -4, 3, "4")),
        *(("hidden_size", value) for value in (0, 63, "64", None)),
        *(("image_size", value) for value in (0, -14, None, "42", [42, 28], 10**6)),
        *(("patch_size", value) for value in (0, None, [14, "x"])),
        ("intermediate_size", -1),
        ("hidden_act", "nope"),
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", None),
    ],
)
def test_wrong_value_in_a_config_is_one_line_that_names_the_folder_or_the_option(
    checkpoints: dict[str, Path], tmp_path: Path, field: str, value: Any
) -> None:
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "c"))
    edit(folder, **{field: value})
    with pytest.raises(TrtowerError, match=rf"{re.escape(str(folder))}|--image-size") as caught:
        open_checkpoint(str(folder)).spec()
    assert "\n" not in str(caught.value)


def test_size_written_as_a_pair_is_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "c"))
    edit(folder, image_size=[42, 42], patch_size=[14, 14])
    assert_same_tower(open_checkpoint(str(folder)), make_model("clip"), (3,))


def test_preprocessor_in_a_processor_config_is_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "c"))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_processor": {"image_mean": [0.1, 0.1, 0.1]}}))
    assert open_checkpoint(str(folder)).layout.preprocessor == {"image_mean": [0.1, 0.1, 0.1]}
    path.write_text(json.dumps({"image_processor": 5}))
    with pytest.raises(CheckpointError, match="image_processor=5 is not an object"):
        open_checkpoint(str(folder))


def test_model_that_does_not_say_its_layer_needs_the_option(llava: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(llava(mm_vision_select_layer="-")))
    with pytest.raises(CheckpointError, match=r"does not say which layer of its tower it reads: .*--select-layer"):
        checkpoint.spec()
    assert checkpoint.spec(-2).layers == (3,)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


JUNK = {"lm_head.weight": torch.ones(64, 32), "model.mm_projector.0.weight": torch.ones(32, 64)}


@pytest.fixture
def llava(tmp_path: Path, checkpoints: dict[str, Path]) -> Callable[..., Path]:
    """Write an original LLaVA folder whose tower is the small CLIP, inside its shards or only named."""

    def write(*, inside: bool = True, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
        folder = tmp_path / "llava"
        folder.mkdir()
        model = make_model("clip")
        if tensors is None:
            root = "model.vision_tower.vision_tower.vision_model."
            tensors = {root + name.removeprefix("vision_model."): t * 2 for name, t in model.state_dict().items()}
        shards = {"model-1-of-2.safetensors": JUNK, "model-2-of-2.safetensors": tensors if inside else {}}
        for name, content in shards.items():
            save_file(content, folder / name)
        weight_map = {name: shard for shard, content in shards.items() for name in content}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        written = {
            "model_type": "llava_llama",
            "mm_vision_tower": str(checkpoints["clip"]),
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
        }
        (folder / "config.json").write_text(json.dumps({k: v for k, v in {**written, **config}.items() if v != "-"}))
        return folder

    return write


def doubled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def test_original_llava_is_read_from_its_shards(llava: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(llava()))
    assert checkpoint.layout.root == "model.vision_tower.vision_tower.vision_model."
    assert checkpoint.describe() == "LLaVA checkpoint, clip tower at model.vision_tower.vision_tower.vision_model"
    assert_same_tower(checkpoint, doubled(make_model("clip")), (3,))


def test_original_llava_without_a_tower_inside_is_read_from_the_one_it_names(
    llava: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    checkpoint = open_checkpoint(str(llava(inside=False)))
    assert_same_tower(checkpoint, make_model("clip"), (3,))
    assert checkpoint.describe().startswith("LLaVA checkpoint, clip tower")
    assert checkpoint.describe().endswith(f"from {checkpoints['clip'].resolve()}")


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llava_mistral", "llava_qwen"])
def test_original_llava_is_not_mistaken_for_transformers_own(llava: Callable[..., Path], model_type: str) -> None:
    assert open_checkpoint(str(llava(model_type=model_type))).layout.kind == "LLaVA checkpoint"


@pytest.mark.parametrize(
    ("layer", "feature", "layers", "kept"),
    [
        (-2, "cls_patch", (3,), "cls_patch"),
        ([-1, 1], "patch", (4, 1), "patch"),
        (0, "slicefour_patch", (1, 2, 3, 4), "patch"),
        (-204, "patch", (4, 3), "patch"),
        (-1, "-", (4,), "patch"),
    ],
)
def test_every_layer_code_of_an_original_llava_is_read(
    llava: Callable[..., Path], layer: Any, feature: str, layers: tuple[int, ...], kept: str
) -> None:
    folder = llava(mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.spec().select_feature == kept
    assert_same_tower(checkpoint, doubled(make_model("clip")), layers)


def test_named_tower_with_a_recipe_needs_no_hub(llava: Callable[..., Path]) -> None:
    folder = llava(inside=False, mm_vision_tower="openai/clip-vit-base-patch32")
    checkpoint = open_checkpoint(str(folder), random_weights=True)
    assert checkpoint.config.hidden_size == 768
    assert checkpoint.spec().layers == (11,)


@pytest.mark.parametrize("named", [None, "-", 3])
def test_llava_config_without_a_tower_names_the_field(llava: Callable[..., Path], named: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is a LLaVA config without a tower: mm_vision_tower is"):
        open_checkpoint(str(llava(mm_vision_tower=named)))


def test_llava_without_the_tower_it_trained_is_refused(llava: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"was trained.*unfreeze_mm_vision_tower"):
        open_checkpoint(str(llava(inside=False, unfreeze_mm_vision_tower=True)))


def test_llava_next_without_the_tower_it_trained_is_refused(llava: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"was trained.*mm_tunable_parts"):
        open_checkpoint(str(llava(inside=False, mm_tunable_parts="mm_vision_tower,mm_mlp_adapter")))


@pytest.mark.parametrize("key", TRAINED)
def test_every_fork_has_its_own_key_for_a_trained_tower(llava: Callable[..., Path], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"was trained \({key}\)"):
        open_checkpoint(str(llava(inside=False, **{key: 2e-6})))


def test_null_layer_needs_the_option(llava: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="does not say which layer"):
        open_checkpoint(str(llava(mm_vision_select_layer=None))).spec()


def test_images_are_prepared_as_the_named_tower_does(llava: Callable[..., Path], tmp_path: Path) -> None:
    named = tmp_path / "named"
    make_model("clip").save_pretrained(named)
    folder = llava(mm_vision_tower=str(named))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.0, 0.0, 0.0]}))
    assert open_checkpoint(str(folder)).layout.preprocessor == {"image_mean": [0.0, 0.0, 0.0]}
    (named / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    assert open_checkpoint(str(folder)).layout.preprocessor == {"image_mean": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("inside", [True, False])
def test_llava_that_names_itself_is_refused_on_one_line(
    llava: Callable[..., Path], tmp_path: Path, inside: bool
) -> None:
    folder = llava(inside=inside, mm_vision_tower=str(tmp_path / "llava"))
    with pytest.raises(CheckpointError, match="is itself a LLaVA checkpoint") as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_llava_adapter_must_be_merged_first(llava: Callable[..., Path]) -> None:
    folder = llava(inside=False)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a LoRA adapter: merge it"):
        open_checkpoint(str(folder))


def test_llava_with_only_a_projector_is_read_from_the_tower_it_names(llava: Callable[..., Path]) -> None:
    folder = llava(inside=False)
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "mm_projector.bin").write_bytes(b"a pickle that nobody opens")
    assert_same_tower(open_checkpoint(str(folder)), make_model("clip"), (3,))


def test_missing_named_tower_names_the_field(llava: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json names mm_vision_tower '/nowhere/clip': .*is not a folder"):
        open_checkpoint(str(llava(mm_vision_tower="/nowhere/clip")))


def test_open_clip_tower_of_llava_next_is_answered_with_what_to_export(llava: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="Export the OpenCLIP file itself"):
        open_checkpoint(str(llava(mm_vision_tower="open_clip_hub:ViT-H-14")))


@pytest.mark.parametrize("layer", ["sliceseven", 1.5, [], True, "slicefour"])
def test_invalid_layer_code_leaves_no_bundle(llava: Callable[..., Path], tmp_path: Path, layer: Any) -> None:
    folder = llava(mm_vision_select_layer=layer)
    with pytest.raises(CheckpointError, match=r"config\.json: mm_vision_select_layer=.* cannot be read: "):
        export_tower(str(folder), tmp_path / "out" / "b", ExportOptions(flavour="none", check=False))
    assert not (tmp_path / "out").exists()


def test_llava_next_may_lack_the_siglip_layer_that_it_drops(llava: Callable[..., Path], tmp_path: Path) -> None:
    vision = make_model("siglip")
    vision.save_pretrained(tmp_path / "siglip")
    saved = {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in vision.state_dict().items()
        if f"layers.{NUM_LAYERS - 1}." not in name and "head." not in name
    }
    folder = llava(tensors=saved, mm_vision_tower=str(tmp_path / "siglip"), mm_vision_select_layer=-2)
    checkpoint = open_checkpoint(str(folder))
    assert_same_tower(checkpoint, vision, (NUM_LAYERS - 1,))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors"):
        checkpoint.load_model(checkpoint.spec(-1))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors"):
        checkpoint.load_model()


@pytest.fixture
def vila(tmp_path: Path) -> Callable[..., Path]:
    def write(family: str = "siglip", **config: Any) -> Path:
        folder = tmp_path / "vila"
        make_model(family).save_pretrained(folder / "vision_tower")
        save_file(JUNK, folder / "model.safetensors")
        written = {
            "model_type": "llava_llama",
            "vision_tower_cfg": "somewhere/else",
            "mm_vision_tower": "somewhere/else",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch",
        }
        (folder / "config.json").write_text(json.dumps({**written, **config}))
        return folder

    return write


def test_vila_is_read_from_its_tower_folder(vila: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(vila()))
    assert checkpoint.layout.kind == "VILA checkpoint"
    assert checkpoint.spec().select_feature == "cls_patch"
    assert_same_tower(checkpoint, make_model("siglip"), (3,))


def test_vila_with_clip_reads_patches(vila: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(vila("clip", mm_vision_select_feature="patch", mm_vision_select_layer=0)))
    assert checkpoint.spec().select_feature == "patch"
    assert_same_tower(checkpoint, make_model("clip"), (0,))


def test_vila_with_patch_on_siglip_would_drop_a_patch(vila: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="mm_vision_select_feature='patch' drops the first token"):
        open_checkpoint(str(vila(mm_vision_select_feature="patch"))).spec()


def test_vila_without_a_layer_gets_vilas_defaults(vila: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(vila("clip", mm_vision_select_layer=None, mm_vision_select_feature=None)))
    assert checkpoint.spec().layers == (NUM_LAYERS - 1,)
    assert checkpoint.spec().select_feature == "patch"


def test_vilas_resized_positions_are_kept_as_they_are(vila: Callable[..., Path]) -> None:
    """VILA's own resizing leaves zeros at some positions. They belong to the model and are not interpolated again."""
    folder = vila()
    path = folder / "vision_tower" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("position_embedding.weight"))
    resized = torch.randn(16, tensors[name].shape[1])
    resized[[0, 15]] = 0
    save_file({**tensors, name: resized}, path, metadata={"format": "pt"})
    edit(folder / "vision_tower", image_size=56)
    checkpoint = open_checkpoint(str(folder))
    tower = truncate(checkpoint.load_model(), checkpoint.family, checkpoint.spec())
    assert any(torch.equal(parameter, resized) for parameter in tower.parameters())
    assert checkpoint.spec().num_tokens == 16


def test_vila_without_its_tower_folder_says_where_it_should_be(vila: Callable[..., Path]) -> None:
    folder = vila()
    shutil.rmtree(folder / "vision_tower")
    with pytest.raises(CheckpointError, match=r"vision_tower/config\.json is missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "llava", "vision_config": {"model_type": "pixtral"}},
            "2-D RoPE.*choose a model whose tower has one size",
        ),
        ({"model_type": "qwen2_vl"}, "2-D RoPE"),
        ({"model_type": "intern_vit_6b", "auto_map": {"AutoModel": "a.B"}}, "own code; export its -hf conversion"),
        ({"model_type": "siglip2_vision_model", "num_patches": 250}, "is not a square grid"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_nearest_that_can(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(str(tmp_path))


def test_two_towers_under_one_name_are_both_named(llava: Callable[..., Path]) -> None:
    model = make_model("clip").state_dict()
    names = {name.removeprefix("vision_model."): tensor for name, tensor in model.items()}
    both = {f"{root}.{n}": t.clone() for root in ("model.vision_tower", "vision_tower") for n, t in names.items()}
    with pytest.raises(CheckpointError, match=r"holds 2 towers: model\.vision_tower\.emb\S+ and vision_tower\.emb"):
        open_checkpoint(str(llava(tensors=both)))


def test_bundle_of_a_llava_folder_is_checked_against_its_own_tower(llava: Callable[..., Path], tmp_path: Path) -> None:
    bundle = export_tower(str(llava(mm_vision_select_layer=-212 + 10)), tmp_path / "b", ExportOptions(flavour="none"))
    assert bundle.manifest.spec.layers == (2, 3)
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
    assert Bundle.open(tmp_path / "b").manifest.source.checkpoint.endswith("llava")


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"not a safetensors file"])
def test_broken_shard_is_named_and_leaves_no_bundle(llava: Callable[..., Path], tmp_path: Path, content: bytes) -> None:
    folder = llava()
    (folder / "model-2-of-2.safetensors").write_bytes(content)
    with pytest.raises(TrtowerError, match=r"model-2-of-2\.safetensors") as caught:
        export_tower(str(folder), tmp_path / "out" / "b", ExportOptions(flavour="none", check=False))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_known_tower_of_an_unknown_model_is_read_if_its_layer_is_chosen(tmp_path: Path) -> None:
    """Only the tower's part of the model's config is read."""
    model = make_model("clip")
    model.save_pretrained(tmp_path / "tower")
    tensors = {f"eyes.{name}": tensor for name, tensor in load_file(tmp_path / "tower" / "model.safetensors").items()}
    folder = tmp_path / "own"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    vision = json.loads((tmp_path / "tower" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "my_llava", "vision_config": vision}))
    with pytest.raises(CheckpointError, match=r"does not say which layer of its tower it reads: .*--select-layer"):
        open_checkpoint(str(folder)).spec()
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.describe().startswith("my_llava model, clip tower at eyes")
    assert checkpoint.spec(-2).layers == (3,)
    read = checkpoint.load_model()
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), model.parameters(), strict=True))
