"""Only the tower's tensors are read, whatever lies around them, and a faulty tensor or file is named."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from trtower.errors import CheckpointError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.files import Files
from trtower_export.checkpoint.tensors import find_tensors
from trtower_export.options import Trust

GIB = 2**30
MARGIN = GIB // 2
"""How much more memory a sharded checkpoint may need than its tower by itself."""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    make_model("clip").save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def rewrite(clip: Path) -> Callable[..., Path]:
    """Apply functions to the tensors of a small CLIP whose names contain their keywords; drop a tensor for None."""

    def change(**changes: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
        path = clip / "model.safetensors"
        tensors = {}
        for name, tensor in load_file(path).items():
            changed = next((edit(tensor) for part, edit in changes.items() if part.replace("__", ".") in name), tensor)
            if changed is not None:
                tensors[name] = changed
        save_file(tensors, path, metadata={"format": "pt"})
        return clip

    return change


def test_tensor_of_another_shape_is_named_with_both_shapes(rewrite: Callable[..., Path]) -> None:
    folder = rewrite(layers__2__mlp__fc1__weight=lambda tensor: tensor[:-3].clone())
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.fc1\.weight has shape \(125, 64\); .* \(128, 64\)"):
        open_checkpoint(str(folder)).load_model()


def test_positions_of_another_size_are_named_with_both_shapes(rewrite: Callable[..., Path]) -> None:
    folder = rewrite(position_embedding=lambda tensor: tensor[:5].clone())
    with pytest.raises(CheckpointError, match=r"position_embedding\.weight has shape \(5, 64\); .* \(10, 64\)"):
        open_checkpoint(str(folder)).load_model()


def test_tensors_that_the_cut_tower_reads_must_be_there(rewrite: Callable[..., Path]) -> None:
    folder = rewrite(layers__1__mlp__fc1__weight=lambda _: None, post_layernorm=lambda _: None)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.load_model(checkpoint.spec(1))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.mlp\.fc1\.weight"):
        checkpoint.load_model(checkpoint.spec(2))


def test_positions_must_be_there_for_another_size_too(rewrite: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(rewrite(position_embedding=lambda _: None)))
    with pytest.raises(CheckpointError, match="position_embedding"):
        checkpoint.load_model(checkpoint.spec(-2, image_size=70))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(rewrite: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = rewrite(layers__2__mlp__fc1__weight=lambda tensor: tensor.to(dtype))
    with pytest.raises(CheckpointError, match=r"fc1\.weight is torch\.\w+, so this tower is quantised"):
        open_checkpoint(str(folder)).load_model()


def root_of(tensors: dict[str, torch.Tensor]) -> str:
    """Return what the names begin with: nothing in transformers 5, `vision_model.` before."""
    name = next(name for name in tensors if name.endswith("embeddings.patch_embedding.weight"))
    return name.removesuffix("embeddings.patch_embedding.weight")


@pytest.mark.parametrize(
    "extra", ["encoder.layers.1.self_attn.q_norm.weight", "embeddings.register_tokens", "encoder.layers.1.ls_1.gamma"]
)
def test_weights_that_the_config_does_not_describe_are_refused(clip: Path, extra: str) -> None:
    path = clip / "model.safetensors"
    tensors = load_file(path)
    extra = root_of(tensors) + extra
    save_file({**tensors, extra: torch.ones(64)}, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"holds {re.escape(extra)}, but its config describes a CLIPVisionModel without it"
    ):
        open_checkpoint(str(clip)).load_model()


def test_position_ids_are_ignored(clip: Path) -> None:
    path = clip / "model.safetensors"
    tensors = load_file(path)
    ids = {f"{root_of(tensors)}embeddings.position_ids": torch.arange(10)[None]}
    save_file({**tensors, **ids}, path, metadata={"format": "pt"})
    assert open_checkpoint(str(clip)).load_model()


def test_pickle_beside_an_open_clip_file_holds_the_model(clip: Path) -> None:
    tensors = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    save_file({"visual.conv1.weight": torch.zeros(2)}, clip / "open_clip_model.safetensors")
    torch.save(tensors, clip / "pytorch_model.bin")
    torch.save(tensors, clip / "pytorch_model.fp16.bin")
    with pytest.raises(CheckpointError, match=r"pickle \(pytorch_model\.bin\)"):
        open_checkpoint(str(clip))
    assert open_checkpoint(str(clip), trust=Trust(allow_pickle=True)).load_model()


def test_pickle_of_an_old_pytorch_is_read(clip: Path) -> None:
    tensors = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    torch.save(tensors, clip / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert open_checkpoint(str(clip), trust=Trust(allow_pickle=True)).load_model()


def test_more_layers_than_the_config_has_are_refused(clip: Path) -> None:
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"holds \S*layers\.3\.\S+, but its config has num_hidden_layers=3"):
        open_checkpoint(str(clip)).load_model()


def shard(folder: Path) -> dict[str, str]:
    """Spread a small CLIP over three shards; return its weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(3):
        name = f"model-{number}.safetensors"
        content = dict(list(tensors.items())[number::3])
        save_file(content, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(content, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shard_that_is_missing_is_named(clip: Path) -> None:
    shard(clip)
    (clip / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing: the index says that it holds tensors"):
        open_checkpoint(str(clip))


def test_shard_that_lacks_what_the_index_promises_is_named(clip: Path) -> None:
    weight_map = shard(clip)
    name = next(name for name, where in weight_map.items() if where == "model-1.safetensors")
    (clip / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map | {name: "model-2.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=rf"model-2\.safetensors does not hold {name}, although the index"):
        open_checkpoint(str(clip))


def test_index_without_a_map_is_named(clip: Path) -> None:
    shard(clip)
    (clip / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        open_checkpoint(str(clip))


def test_shards_without_an_index_are_read_by_their_headers(clip: Path) -> None:
    expected = open_checkpoint(str(clip)).load_model()
    shard(clip)
    (clip / "model.safetensors.index.json").unlink()
    model = open_checkpoint(str(clip)).load_model()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


def test_one_name_in_two_shards_without_an_index_is_refused(clip: Path) -> None:
    shard(clip)
    (clip / "model.safetensors.index.json").unlink()
    shutil.copy(clip / "model-0.safetensors", clip / "model-9.safetensors")
    with pytest.raises(CheckpointError, match=r"both hold \S+, and no index says which"):
        open_checkpoint(str(clip))


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_file_cut_short_is_named_before_any_work(clip: Path, kept: int) -> None:
    path = clip / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    problem = "could not be read; it may be cut short" if kept else "is empty"
    with pytest.raises(CheckpointError, match=rf"model\.safetensors {problem}: .+\.$"):
        open_checkpoint(str(clip))


def test_whole_pickled_model_is_refused_with_what_to_save(clip: Path) -> None:
    model = open_checkpoint(str(clip)).load_model()
    (clip / "model.safetensors").unlink()
    torch.save(model, clip / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors.* save its state_dict\(\)"):
        open_checkpoint(str(clip), trust=Trust(allow_pickle=True))


def test_pickled_shards_are_refused_only_if_the_tower_is_in_them(clip: Path) -> None:
    path = clip / "pytorch_model.bin.index.json"
    (clip / "model.safetensors").unlink()
    names = {"a.weight": "pytorch_model-1.bin", "tower.patch.weight": "pytorch_model-2.bin"}
    path.write_text(json.dumps({"weight_map": names}))
    tensors = find_tensors(Files(folder=clip), allow_pickle=False)
    assert tensors.root("absent.weight") is None
    assert tensors.root("patch.weight") == "tower."
    with pytest.raises(CheckpointError, match=r"pickle \(pytorch_model-2\.bin\).*--allow-pickle"):
        tensors.select("tower.")


def test_pickled_shards_are_read_if_they_are_allowed(clip: Path) -> None:
    expected = open_checkpoint(str(clip)).load_model()
    tensors = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    torch.save(tensors, clip / "pytorch_model-1.bin")
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}
    (clip / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = open_checkpoint(str(clip), trust=Trust(allow_pickle=True)).load_model()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


def write_sparse(path: Path, name: str, size: int, beside: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file with these FP32 tensors and a sparse FP16 tensor of zeros, which uses no disk."""
    header, offset = {}, 0
    for other, tensor in beside.items():
        end = offset + tensor.nbytes
        header[other] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header[name] = {"dtype": "F16", "shape": [size // 2], "data_offsets": [offset, offset + size]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in beside.values():
            stream.write(tensor.contiguous().numpy().tobytes())
        stream.truncate(8 + len(text) + offset + size)


def peak_memory_of_export(folder: Path, out: Path) -> int:
    """Export in a separate process; return its peak memory in bytes."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from trtower_export.pipeline import ExportOptions, export_tower\n"
        "export_tower(sys.argv[1], Path(sys.argv[2]), ExportOptions(flavour='none', check=False))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(out)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sharded_checkpoint_of_gigabytes_needs_no_more_memory_than_its_tower(clip: Path, tmp_path: Path) -> None:
    tower = {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in load_file(clip / "model.safetensors").items()
    }
    folder = tmp_path / "llava"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for number in range(4):
        name, large = f"model-{number}.safetensors", f"model.layers.{number}.mlp.weight"
        beside = dict(list(tower.items())[number::4])
        write_sparse(folder / name, large, GIB, beside)
        weight_map |= dict.fromkeys((large, *beside), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": str(clip), "mm_vision_select_layer": -2}))
    assert sum(path.stat().st_size for path in folder.iterdir()) > 4 * GIB
    tensors = open_checkpoint(str(folder)).layout.tensors
    assert tensors
    assert tensors.read().keys() == tower.keys()
    alone = peak_memory_of_export(clip, tmp_path / "alone")
    inside = peak_memory_of_export(folder, tmp_path / "inside")
    assert inside < alone + MARGIN
