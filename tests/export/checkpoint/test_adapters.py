"""A tower that an adapter changes is refused until the adapter is merged; otherwise the tower is exported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from tests.export.checkpoint.test_layouts import LLAMA, TEXT, assert_same_tower, save_composite
from trtower.errors import CheckpointError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.options import Trust
from trtower_export.pipeline import ExportOptions, export_tower

PEFT = "base_model.model."
LANGUAGE = "model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def adapt(folder: Path, *names: str, pickled: bool = False, **config: object) -> Path:
    """Write an adapter with these tensors into a folder, as peft does."""
    folder.mkdir(exist_ok=True)
    tensors = {PEFT + name: torch.ones(2, 2) for name in names}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    save_composite("Llava", "clip", tmp_path / "llava", text_config=LLAMA)
    return tmp_path / "llava"


OF_THE_TOWER = [
    "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_B.weight",
    "vision_tower.vision_model.encoder.layers.3.mlp.fc1.ia3_l",
    "encoder.layers.1.self_attn.v_proj.lora_magnitude_vector",
    "model.vision_tower.embeddings.patch_embedding.weight",  # of modules_to_save
    "model.vision_tower.encoder.layers.0.mlp.fc2.hada_w1_a",
    "visual.blocks.0.attn.qkv.lora_A.weight",  # the same tower under the names of another release
    "prompt_embeddings",
]


@pytest.mark.parametrize("name", OF_THE_TOWER)
def test_adapter_of_the_tower_beside_its_model_must_be_merged(llava: Path, name: str) -> None:
    adapt(llava, LANGUAGE, name)
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json belongs to a LoRA adapter: merge it .*merge_and_unload"
    ):
        open_checkpoint(str(llava))


OF_THE_REST = [
    LANGUAGE,
    "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.layers.0.self_attn.q_proj.lora_A.weight",
    "model.language_model.layers.0.mlp.down_proj.ia3_l",
    "model.language_model.embed_tokens.lora_embedding_A",
    "lm_head.lora_A.weight",
    "lm_head.base_layer.weight",
    "model.multi_modal_projector.linear_1.weight",  # of modules_to_save
]


def test_adapter_of_the_rest_is_reported_and_does_not_change_the_tower(
    llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(llava, *OF_THE_REST, base_model_name_or_path="somebody/base")
    with caplog.at_level("INFO"):
        export_tower(str(llava), tmp_path / "b", ExportOptions(flavour="none", check=False))
    assert "adapter_model.safetensors is a LoRA adapter that does not change the tower" in caplog.text
    assert "Its base model is 'somebody/base', and transformers may load the model from there" in caplog.text
    assert_same_tower(open_checkpoint(str(llava)), make_model("clip"), (3,))


def test_adapter_of_clips_text_model_is_not_taken_for_one_of_its_tower(tmp_path: Path) -> None:
    save_composite("CLIP", "clip", tmp_path, text_config=TEXT)
    adapt(tmp_path, "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight")
    assert open_checkpoint(str(tmp_path)).layout.remarks
    adapt(tmp_path, "encoder.layers.0.self_attn.q_proj.lora_A.weight")  # fits either
    with pytest.raises(CheckpointError, match="may belong to the tower"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["vision_model.encoder.layers.0.mlp.fc1.lora_A.weight", "layers.0.mlp.x.lora_A.weight"]
)
def test_adapter_of_a_plain_vision_model_is_always_the_towers(tmp_path: Path, name: str) -> None:
    make_model("clip").save_pretrained(tmp_path)
    adapt(tmp_path, name)
    with pytest.raises(CheckpointError, match="a LoRA adapter: merge it"):
        open_checkpoint(str(tmp_path))


def test_pickled_adapter_is_refused_unread(llava: Path) -> None:
    adapt(llava, LANGUAGE, pickled=True)
    with pytest.raises(CheckpointError, match=r"pickle, adapter_model\.bin"):
        open_checkpoint(str(llava))
    assert open_checkpoint(str(llava), trust=Trust(allow_pickle=True)).layout.remarks


def test_adapter_without_its_weights_is_refused(llava: Path) -> None:
    (llava / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="an IA3 adapter: merge it"):
        open_checkpoint(str(llava))


def test_adapter_in_an_inner_folder_is_reported_as_not_applied(llava: Path) -> None:
    adapt(llava / "my_adapter", OF_THE_TOWER[0])
    checkpoint = open_checkpoint(str(llava))
    assert "my_adapter holds an adapter, which transformers does not apply" in " ".join(checkpoint.layout.remarks)


def test_rehearsal_needs_no_weights_and_no_merging(llava: Path) -> None:
    adapt(llava, OF_THE_TOWER[0])
    assert open_checkpoint(str(llava), random_weights=True).random_weights


def original_llava(folder: Path, tower: Path, *, inside: bool) -> Path:
    tensors = {"lm_head.weight": torch.ones(4, 4), "model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    if inside:
        root = "model.vision_tower.vision_tower.vision_model."
        own = load_file(tower / "model.safetensors")
        tensors |= {root + name.removeprefix("vision_model."): tensor for name, tensor in own.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    written = {"model_type": "llava_llama", "mm_vision_tower": str(tower), "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_same_rule_applies_to_an_original_llava(checkpoints: dict[str, Path], tmp_path: Path, inside: bool) -> None:
    folder = original_llava(tmp_path / "llava", checkpoints["clip"], inside=inside)
    adapt(folder, "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.7.self_attn.q_proj.lora_A.weight")
    assert "does not change the tower" in " ".join(open_checkpoint(str(folder)).layout.remarks)
    adapt(folder, "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight")
    with pytest.raises(CheckpointError, match="a LoRA adapter: merge it"):
        open_checkpoint(str(folder))


def test_same_rule_applies_to_the_tower_that_a_llava_names(tmp_path: Path) -> None:
    make_model("clip").save_pretrained(tmp_path / "clip")
    folder = original_llava(tmp_path / "llava", tmp_path / "clip", inside=False)
    adapt(tmp_path / "clip", "vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight")
    with pytest.raises(CheckpointError, match="a LoRA adapter: merge it"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("place", ["", "vision_tower"])
def test_same_rule_applies_to_vila(tmp_path: Path, place: str) -> None:
    make_model("siglip").save_pretrained(tmp_path / "vila" / "vision_tower")
    written = {"model_type": "llava_llama", "vision_tower_cfg": "x", "mm_vision_select_feature": "cls_patch"}
    (tmp_path / "vila" / "config.json").write_text(json.dumps(written))
    adapt(tmp_path / "vila", "model.layers.0.self_attn.q_proj.lora_A.weight")
    assert "does not change the tower" in " ".join(open_checkpoint(str(tmp_path / "vila")).layout.remarks)
    adapt(tmp_path / "vila" / place, "vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight")
    with pytest.raises(CheckpointError, match="a LoRA adapter: merge it"):
        open_checkpoint(str(tmp_path / "vila"))


@pytest.mark.parametrize(
    "config", [None, {"model_type": "llava_llama", "mm_vision_tower": "TOWER"}, {"model_type": "clip_vision_model"}]
)
def test_adapter_without_a_model_names_its_base(
    checkpoints: dict[str, Path], tmp_path: Path, config: dict[str, str] | None
) -> None:
    adapt(tmp_path, LANGUAGE, base_model_name_or_path="liuhaotian/llava-v1.5-7b")
    if config:
        text = json.dumps(config).replace("TOWER", str(checkpoints["clip"]))
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter: merge it into liuhaotian/llava-v1\.5-7b"):
        open_checkpoint(str(tmp_path))


@pytest.fixture
def rename(tmp_path: Path) -> Callable[[Callable[[str], str]], Path]:
    """Write a small CLIP with renamed tensors."""

    def write(change: Callable[[str], str]) -> Path:
        make_model("clip").save_pretrained(tmp_path / "clip")
        path = tmp_path / "clip" / "model.safetensors"
        save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        return tmp_path / "clip"

    return write


@pytest.mark.parametrize(
    ("part", "renamed"),
    [
        ("layers.2.self_attn.q_proj.", "layers.2.self_attn.q_proj.base_layer."),
        ("layers.2.self_attn.q_proj.bias", "layers.2.self_attn.q_proj.lora_A.default.weight"),
        ("layers.2.self_attn.q_proj.bias", "layers.2.self_attn.q_proj.lora_magnitude_vector.default.weight"),
        ("layers.2.mlp.fc1.bias", "layers.2.mlp.fc1.ia3_l.default"),
        ("embeddings.position_embedding.weight", "embeddings.position_embedding.lora_embedding_A.default"),
        ("embeddings.patch_embedding.", "embeddings.patch_embedding.base_layer."),
        ("embeddings.", "embeddings.original_module."),
        ("embeddings.", "embeddings.modules_to_save.default."),
    ],
)
def test_adapter_inside_the_weights_must_be_merged(
    rename: Callable[[Callable[[str], str]], Path], part: str, renamed: str
) -> None:
    folder = rename(lambda name: name.replace(part, renamed))
    with pytest.raises(CheckpointError, match=r"of an adapter that was not merged: merge it .*merge_and_unload"):
        open_checkpoint(str(folder))


def test_module_saved_beside_its_original_is_not_a_second_tower(llava: Path) -> None:
    path = llava / "model.safetensors"
    tensors = load_file(path)
    tower = {name: tensor for name, tensor in tensors.items() if "vision_tower." in name}
    for part in ("original_module", "modules_to_save.default"):
        tensors |= {name.replace("vision_tower.", f"vision_tower.{part}."): t.clone() for name, t in tower.items()}
    save_file({name: t for name, t in tensors.items() if name not in tower}, path)
    with pytest.raises(CheckpointError, match="not merged"):
        open_checkpoint(str(llava))


def test_adapter_inside_the_language_model_is_reported(llava: Path) -> None:
    path = llava / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "language_model" in name and name.endswith("q_proj.weight"))
    tensors[name.replace("q_proj.", "q_proj.base_layer.")] = tensors.pop(name)
    tensors[name.replace("q_proj.", "q_proj.lora_A.default.")] = torch.ones(2, 2)
    save_file(tensors, path)
    checkpoint = open_checkpoint(str(llava))
    assert "was not merged; it does not change the tower" in " ".join(checkpoint.layout.remarks)
    assert_same_tower(checkpoint, make_model("clip"), (3,))
