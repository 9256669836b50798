"""What cannot have the head that was asked for: one clear line, before any weight is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from tests.export.heads.models import make
from trtower.errors import CheckpointError, ConfigError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower, load_head
from trtower_export.options import ExportOptions
from trtower_export.pipeline import export_tower

pytestmark = pytest.mark.usefixtures("one_thread")


def describe(source: Path, **options: Any) -> Any:
    return describe_tower(open_checkpoint(str(source)), ExportOptions(**{"head": "projector", **options}))


def load(source: Path) -> Any:
    checkpoint = open_checkpoint(str(source))
    return load_head(checkpoint, torch.nn.Module(), describe_tower(checkpoint, ExportOptions(head="projector")))


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    make("llava").save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    found = {name: each for name, each in tensors.items() if not any(name.endswith(end) for end in changes)}
    added = {next(n for n in tensors if n.endswith(end)): each for end, each in changes.items() if each is not None}
    save_file(found | added, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("options", "message"), [
    ({"head": "projecter"}, "unknown head 'projecter'; did you mean 'projector'?"),
    ({"head": "none", "normalize": True}, "--normalize needs --head embedding; the head is none."),
    ({"head": "projector", "normalize": True}, "--normalize needs --head embedding; the head is projector."),
    ({"head": "projector", "pool": "cls"}, "--pool needs --head embedding; the head is projector."),
    ({"head": "embedding", "pool": "mean"}, "unknown pool 'mean'"),
    ({"head": "embedding", "select_layer": -2}, "--head embedding is made of the last hidden state: leave out"),
    ({"head": "embedding", "select_feature": "patch"}, "--head embedding is made of the last hidden state: leave out"),
])  # fmt: skip
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        ExportOptions(**options)
    assert message in str(found.value)


def test_tower_by_itself_has_no_projector(tmp_path: Path) -> None:
    make_model("clip").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a vision tower by itself and has no projector: name the checkpoint"):
        describe(tmp_path)


def test_contrastive_model_has_no_projector(tmp_path: Path) -> None:
    vision = make_model("siglip").config.to_dict()
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text | {"vocab_size": 99})
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r", a siglip, has no projector: use --head embedding"):
        describe(tmp_path)


def test_q_former_is_refused_by_name(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 28, "patch_size": 14}
    text = small | {"model_type": "opt", "vocab_size": 99, "ffn_dim": 32, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=small | {"encoder_hidden_size": 32}, text_config=text
    )
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has no projector that an engine can hold: its Q-Former is a network of"
    ):
        describe(tmp_path)


def test_pooling_by_choice_is_only_for_models_without_a_pooling_head(tmp_path: Path) -> None:
    make_model("siglip").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"--pool cls_mean does not go with this checkpoint, whose embedding is made by"
    ):
        describe(tmp_path, head="embedding", pool="cls_mean")


def test_projector_without_a_tensor_is_refused(llava: Path) -> None:
    edit(llava, **{"multi_modal_projector.linear_2.bias": None})
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.linear_2\.bias is missing"):
        load(llava)


def test_projector_of_another_shape_is_refused(llava: Path) -> None:
    edit(llava, **{"multi_modal_projector.linear_2.weight": torch.ones(48, 47)})
    with pytest.raises(CheckpointError, match=r"linear_2\.weight has shape \(48, 47\); its config expects \(48, 48\)"):
        load(llava)


def test_quantised_projector_is_refused(llava: Path) -> None:
    edit(llava, **{"multi_modal_projector.linear_1.weight": torch.ones(48, 32, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"linear_1\.weight is torch\.int8, so this tower is quantised"):
        load(llava)


def test_projector_of_another_width_than_the_language_model_is_refused(tmp_path: Path) -> None:
    model = make("paligemma")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["projection_dim"] = config["projection_dim"] = 47
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gives features of 47, but the language model's are of 48"):
        describe(tmp_path)


def test_unmerged_adapter_of_the_projector_is_refused(llava: Path) -> None:
    tensors = load_file(llava / "model.safetensors")
    name = next(name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight"))
    tensors[name.replace("linear_1.weight", "linear_1.lora_A.default.weight")] = torch.ones(2, 32)
    save_file(tensors, llava / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight, part of an adapter that was not merged"):
        load(llava)


def test_projector_that_is_not_finite_is_refused_before_anything_is_written(llava: Path, tmp_path: Path) -> None:
    edit(llava, **{"multi_modal_projector.linear_1.bias": torch.full((48,), torch.nan)})
    options = ExportOptions(head="projector", flavour="none", check=False)
    with pytest.raises(CheckpointError, match=r"is not finite in FP32 on .*, so nothing can be compared with it"):
        export_tower(str(llava), tmp_path / "b", options)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("options", [{"image_size": 70}, {"select_layer": (-2, -3)}, {"select_feature": "cls_patch"}])
def test_options_that_a_projector_was_not_trained_with_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    make("internvl").save_pretrained(tmp_path)
    option = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(CheckpointError, match=f"leave out {option}, which the projector was not trained with"):
        describe(tmp_path, **options)


def test_model_that_drops_a_patch_is_refused(tmp_path: Path) -> None:
    make("llava_onevision").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_feature_select_strategy": "default"}))
    with pytest.raises(CheckpointError, match=r"drops the first token of a siglip tower, which has 0 before"):
        describe(tmp_path)


def test_config_without_a_language_model_is_named_and_not_a_traceback(llava: Path) -> None:
    path = llava / "config.json"
    config = json.loads(path.read_text())
    config["projector_hidden_act"] = "none such"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its head could not be built: .*none such"):
        describe(llava)


def test_projector_that_returns_only_zeros_is_refused(tmp_path: Path) -> None:
    model = make("gemma3")
    model.model.multi_modal_projector.mm_input_projection_weight.zero_()  # as transformers makes it anew
    model.save_pretrained(tmp_path / "gemma3")
    options = ExportOptions(head="projector", flavour="none", check=False)
    with pytest.raises(CheckpointError, match=r"features are zero for every image.* of its Gemma3Multi.* trained\?"):
        export_tower(str(tmp_path / "gemma3"), tmp_path / "b", options)
    assert not (tmp_path / "b").exists()
