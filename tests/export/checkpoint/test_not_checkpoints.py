"""What is not a checkpoint is recognised, and the message says what to export instead."""

import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from trtower.errors import CheckpointError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.options import Trust

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)


def refusal(source: Path | str, trust: Trust | None = None) -> str:
    """Return the error message for a source, which must be one line."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(source), trust=trust).load_model()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def clip(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["clip"], tmp_path / "clip"))


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
)
def test_git_lfs_pointer_is_answered_with_a_pull(clip: Path, name: str) -> None:
    if "0000" in name or "index" in name:
        shard(clip)
    (clip / name).write_text(POINTER)
    assert f"{clip / name} is a git-lfs pointer and not the file itself: run `git lfs pull` in {clip}" in refusal(clip)


def test_git_lfs_pointer_instead_of_a_pickle_is_answered_with_a_pull(clip: Path) -> None:
    (clip / "model.safetensors").unlink()
    (clip / "pytorch_model.bin").write_text(POINTER)
    assert "git lfs pull" in refusal(clip, Trust(allow_pickle=True))
    assert "git lfs pull" in refusal(clip / "pytorch_model.bin")


def test_git_lfs_pointer_instead_of_an_adapter_is_answered_with_a_pull(clip: Path) -> None:
    (clip / "adapter_config.json").write_text("{}")
    (clip / "adapter_model.safetensors").write_text(POINTER)
    assert "git lfs pull" in refusal(clip)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(("content", "reason"), [("", "is empty"), ("<!DOCTYPE html><html>", "is a web page")])
def test_failed_download_is_named(clip: Path, name: str, content: str, reason: str) -> None:
    (clip / name).write_text(content)
    assert f"{clip / name} {reason}" in refusal(clip)


@pytest.mark.parametrize("name", ["model.safetensors.incomplete", ".cache/huggingface/download/a.incomplete"])
def test_interrupted_download_is_named(clip: Path, name: str) -> None:
    (clip / "model.safetensors").unlink()
    (clip / name).parent.mkdir(parents=True, exist_ok=True)
    (clip / name).write_bytes(b"part")
    assert f"The download of {name} was interrupted" in refusal(clip)


FILES: dict[str, tuple[bytes, str]] = {
    "model.gguf": (
        b"GGUF\x03\x00\x00\x00",
        "a GGUF file of llama.cpp: export the checkpoint that it was converted from",
    ),
    "gguf-by-another-name.bin": (b"GGUF\x03\x00\x00\x00", "a GGUF file of llama.cpp"),
    "mmproj.onnx": (b"\x08\x07\x12\x07pytorch", "an ONNX graph: export the PyTorch checkpoint"),
    "tower.engine": (b"ftrt\x00\x00", "a TensorRT engine: export the PyTorch checkpoint"),
    "tower.plan": (b"anything", "a TensorRT engine: export the PyTorch checkpoint"),
    "tower.bin": (b"ftrt\x00\x00\x00\x00", "a TensorRT engine"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n", "a Keras file"),
    "flax_model.msgpack": (b"\x81\xa6params", "Flax weights"),
    "clip.tar.gz": (b"\x1f\x8b\x08\x00", "an archive: unpack it"),
    "README.md": (b"# CLIP\n", "not a checkpoint: expected a folder with a config.json"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("beside", [None, "config.json", "open_clip_config.json"])
def test_file_of_another_tool_is_recognised(tmp_path: Path, name: str, beside: str | None) -> None:
    content, what = FILES[name]
    (tmp_path / name).write_bytes(content)
    if beside and name != "README.md":
        (tmp_path / beside).write_text("{}")
    assert f"{tmp_path / name} is {what}" in refusal(tmp_path / name)


def test_archives_are_recognised_by_their_content(clip: Path, tmp_path: Path) -> None:
    for suffix, stem in ((".tar", "clip"), (".zip", "clip"), (".pt", "other")):
        path = tmp_path / f"{stem}{suffix}"
        if suffix == ".tar":
            with tarfile.open(path, "w") as archive:
                archive.add(clip, "clip")
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(clip / "config.json", "clip/config.json")
        assert f"{path} is an archive: unpack it, and export the folder" in refusal(path)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_script_is_not_mistaken_for_weights(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "tower.pt")
    assert "is a TorchScript program: export the PyTorch checkpoint" in refusal(tmp_path / "tower.pt")


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_file({"a": torch.ones(2)}, path.with_suffix(".safetensors")),
        lambda path: torch.save({"a": torch.ones(2)}, path.with_suffix(".bin")),
        lambda path: torch.save({"a": torch.ones(2)}, path.with_suffix(".pt"), _use_new_zipfile_serialization=False),
        lambda path: path.with_suffix(".ckpt").write_bytes(pickle.dumps({"a": 1})),
    ],
)
def test_file_of_weights_is_answered_with_the_folder_to_export(tmp_path: Path, save: Callable[[Path], object]) -> None:
    save(tmp_path / "model")
    (path,) = tmp_path.iterdir()
    assert f"{path} has no open_clip_config.json beside it, and no config.json" in refusal(path)
    (tmp_path / "config.json").write_text("{}")
    assert f"{path} is one file of a checkpoint: export the folder that holds it, {tmp_path}." in refusal(path)


def test_config_or_adapter_is_answered_with_the_folder_to_export(clip: Path) -> None:
    assert f"export the folder that holds it, {clip}." in refusal(clip / "config.json")
    (clip / "adapter_model.safetensors").write_bytes((clip / "model.safetensors").read_bytes())
    assert f"is part of an adapter: export {clip}" in refusal(clip / "adapter_model.safetensors")


@pytest.mark.parametrize("inner", ["snapshots/0a1b2c", "checkpoint-1000", "vision_tower", "model", "a/b/c"])
def test_folder_around_a_checkpoint_names_it(checkpoints: dict[str, Path], tmp_path: Path, inner: str) -> None:
    shutil.copytree(checkpoints["clip"], tmp_path / "run" / inner)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    message = refusal(tmp_path / "run")
    assert "not a checkpoint: it has no config.json" in message
    assert str(tmp_path / "run" / inner) in message


def test_folder_around_a_checkpoint_may_have_its_own_config(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["clip"], tmp_path / "checkpoint-1000")
    (tmp_path / "config.json").write_text('{"learning_rate": 1e-5}')
    assert f"its config.json has no model_type. Export {tmp_path / 'checkpoint-1000'}" in refusal(tmp_path)


def test_folder_around_several_names_those_with_a_tower(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(checkpoints["clip"], tmp_path / name)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    message = refusal(tmp_path)
    assert "checkpoint-1 or " in message
    assert "checkpoint-2" in message
    assert "unet" not in message


def test_config_without_weights_names_the_folder_that_has_them(clip: Path, checkpoints: dict[str, Path]) -> None:
    (clip / "model.safetensors").unlink()
    shutil.copytree(checkpoints["clip"], clip / "checkpoint-1000")
    assert str(clip / "checkpoint-1000") in refusal(clip)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (("model_index.json", "image_encoder/config.json"), "a diffusers pipeline"),
        (("modules.json", "0_CLIPModel/config.json"), "a sentence-transformers model"),
        (("tokenizer_config.json", "tokenizer.json"), "a tokenizer"),
        (("model.gguf",), "model.gguf is a GGUF file of llama.cpp"),
        (("model.safetensors",), "to describe model.safetensors"),
        ((), "the folder is empty"),
    ],
)
def test_folder_of_another_library_is_recognised(tmp_path: Path, files: tuple[str, ...], reason: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    message = refusal(tmp_path)
    assert reason in message
    assert all(str((tmp_path / name).parent) in message for name in files)


def test_bundle_is_recognised(fp32_bundle: Path, checkpoints: dict[str, Path]) -> None:
    assert str(fp32_bundle) not in refusal(fp32_bundle.parent)
    message = refusal(fp32_bundle)
    assert f"{fp32_bundle} is a bundle, which trtower exported from {checkpoints['clip'].resolve()}" in message


@pytest.mark.parametrize("config", [{}, {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "bert", "t5"])
def test_language_model_is_recognised(tmp_path: Path, config: dict[str, object], model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    assert f"model_type '{model_type}' is a language model without a vision tower" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mlcd_vision_model"}, "rotate queries and keys in 2-D"),
        ({"model_type": "llava_onevision", "vision_config": {"model_type": "mlcd_vision_model"}}, "rotate queries"),
        ({"model_type": "moonvit"}, "belongs to no family"),
        ({"model_type": "my_llava", "vision_config": {"model_type": "my_vit"}}, "'my_vit' belongs to no family"),
        ({"model_type": "llava", "vision_config": {"model_type": "my_vit"}}, "'my_vit' belongs to no family"),
    ],
)
def test_own_code_is_not_requested_if_it_cannot_help(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    for trust in (Trust(), Trust(remote_code=True)):
        message = refusal(tmp_path, trust)
        assert reason in message
        assert "--trust-remote-code" not in message
    assert not (tmp_path / "mark").exists()


def test_own_code_is_requested_if_it_may_help(tmp_path: Path) -> None:
    for config in (
        {"model_type": "clip_vision_model"},
        {"model_type": "my_llava", "vision_config": {"model_type": "clip_vision_model"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.C"}}))
        assert "--trust-remote-code" in refusal(tmp_path)


def test_paths_are_expanded_as_in_a_shell(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoints["clip"], tmp_path / "clip")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in (
        "~/clip",
        "clip",
        "clip/",
        "./clip//",
        str(tmp_path / "clip") + "/",
        "../" + tmp_path.name + "/clip",
    ):
        opened = open_checkpoint(source)
        assert (opened.name, opened.source) == ("clip", str(tmp_path / "clip"))
    for source in ("~nobody-has-this-home/x", "x" * 5000):
        assert f"{source} is not a folder" in refusal(source)


def test_plain_vision_model_gets_no_remarks(tmp_path: Path) -> None:
    make_model("clip").save_pretrained(tmp_path)
    assert open_checkpoint(str(tmp_path)).layout.remarks == ()
