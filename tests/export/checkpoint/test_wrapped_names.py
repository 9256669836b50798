"""Known wrappers are removed from the names of tensors, and unknown ones are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.conftest import make_model
from tests.export.checkpoint.test_layouts import assert_same_tower
from trtower.errors import CheckpointError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.options import Trust
from trtower_export.pipeline import ExportOptions, export_tower


def write(folder: Path, change: Callable[[str], str]) -> Path:
    """Write a small CLIP with renamed tensors."""
    make_model("clip").save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
        lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda name: name.replace("embeddings.", "embeddings._fsdp_wrapped_module."),
        lambda name: name.replace("mlp.", "_fsdp_wrapped_module._checkpoint_wrapped_module.mlp."),
    ],
)
def test_wrapper_is_removed_and_reported(
    tmp_path: Path, change: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "clip", change)
    with caplog.at_level("INFO"):
        export_tower(str(folder), tmp_path / "b", ExportOptions(flavour="none", check=False))
    assert "from the names of the tower's tensors: they only wrap modules" in caplog.text
    assert_same_tower(open_checkpoint(str(folder)), make_model("clip"), (3,))


def test_state_dict_that_pytorch_saves_of_a_wrapped_model_is_read(tmp_path: Path) -> None:
    model = make_model("clip")
    layers: Any = getattr(model, "vision_model", model).encoder.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    compiled: Any = torch.compile(model)
    state = {f"module.{name}": tensor for name, tensor in compiled.state_dict().items()}  # as DDP does
    state = {name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): t for name, t in state.items()}
    make_model("clip").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": state}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(tmp_path), trust=Trust(allow_pickle=True))
    assert_same_tower(checkpoint, make_model("clip"), (3,))


@pytest.mark.parametrize(
    ("part", "wrapped", "wrapper"),
    [
        ("layers.1.", "layers.1._my_wrapper.", "_my_wrapper"),
        ("layers.1.", "layers.1.module.", "module"),
        ("embeddings.", "embeddings._my_wrapper.", "_my_wrapper"),
    ],
)
def test_unknown_wrapper_is_named(tmp_path: Path, part: str, wrapped: str, wrapper: str) -> None:
    folder = write(tmp_path, lambda name: name.replace(part, wrapped))
    with pytest.raises(CheckpointError, match=rf"{wrapper}.*save_pretrained"):
        open_checkpoint(str(folder))


def test_tensor_saved_both_with_and_without_its_wrapper_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, lambda name: name)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"_orig_mod.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="have the same name once wrappers are removed"):
        open_checkpoint(str(folder))
