"""What is read, what is refused, and that no part of a tower stays random."""

import json
import os
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined] # it is not in __all__
from safetensors.torch import load_file, save_file

from tests.conftest import WIDTH
from trtower.errors import CheckpointError
from trtower_export.checkpoint import files as module
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.options import ExportOptions, Trust
from trtower_export.recipes import all_recipes


def copy(source: Path, target: Path, **config: object) -> Path:
    shutil.copytree(source, target)
    data = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**data, **config}))
    return target


def whole_clip(vision: torch.nn.Module) -> transformers.CLIPModel:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision.config.to_dict())
    model = transformers.CLIPModel(config)
    inner = getattr(vision, "vision_model", vision)
    model.vision_model.load_state_dict(inner.state_dict())
    return model


@pytest.fixture
def clip(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["clip"]


def test_vision_tower_of_a_whole_clip_model_is_read(clip: Path, tmp_path: Path) -> None:
    vision = open_checkpoint(str(clip)).load_model()
    whole_clip(vision).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.hidden_size == WIDTH
    model = checkpoint.load_model()
    assert all(torch.equal(a, b) for a, b in zip(vision.parameters(), model.parameters(), strict=True))


def test_sharded_weights_are_read(clip: Path, tmp_path: Path) -> None:
    vision = open_checkpoint(str(clip)).load_model()
    vision.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = open_checkpoint(str(tmp_path)).load_model()
    assert all(torch.equal(a, b) for a, b in zip(vision.parameters(), model.parameters(), strict=True))


def test_half_precision_weights_are_widened(clip: Path, tmp_path: Path) -> None:
    open_checkpoint(str(clip)).load_model().half().save_pretrained(tmp_path)
    assert next(open_checkpoint(str(tmp_path)).load_model().parameters()).dtype == torch.float32


def test_folder_without_config_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no config\.json"):
        open_checkpoint(str(tmp_path))


def test_missing_folder_is_not_looked_up_on_the_hub() -> None:
    with pytest.raises(CheckpointError, match=r"\./nowhere is not a folder"):
        open_checkpoint("./nowhere")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model_type", ["swin", "no-such-type", None])
def test_model_without_a_family_lists_the_families(tmp_path: Path, model_type: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=r"no family.*clip \(clip_vision_model\).*dinov2 \(dinov2\)"):
        open_checkpoint(str(tmp_path))


def test_missing_tensors_are_not_left_random(clip: Path, tmp_path: Path) -> None:
    copy(clip, tmp_path / "c", num_hidden_layers=6)
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of a CLIPVisionModel"):
        open_checkpoint(str(tmp_path / "c")).load_model()


def test_weights_cut_short_are_refused(clip: Path, tmp_path: Path) -> None:
    folder = copy(clip, tmp_path / "c")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="could not be read"):
        open_checkpoint(str(folder)).load_model()


def test_folder_without_weights_says_what_is_expected(clip: Path, tmp_path: Path) -> None:
    folder = copy(clip, tmp_path / "c")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(str(folder)).load_model()


class Explosive:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.mark),))


def test_pickled_weights_are_refused_unread(clip: Path, tmp_path: Path) -> None:
    folder = copy(clip, tmp_path / "c")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(str(folder)).load_model()
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_read_when_allowed(clip: Path, tmp_path: Path) -> None:
    expected = open_checkpoint(str(clip)).load_model()
    folder = copy(clip, tmp_path / "c")
    (folder / "model.safetensors").unlink()
    torch.save(expected.state_dict(), folder / "pytorch_model.bin")
    model = open_checkpoint(str(folder), trust=Trust(allow_pickle=True)).load_model()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("shard", ["shard.bin", "../outside.safetensors", "/etc/shard.safetensors"])
def test_index_cannot_smuggle_a_pickle_or_a_path_in(clip: Path, tmp_path: Path, shard: str) -> None:
    folder = copy(clip, tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "dummy.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"only \.safetensors files beside it are read"):
        open_checkpoint(str(folder)).load_model()


class FakeHub:
    """A hub that copies the requested files from a folder, matching patterns as the real one does."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache

    def download(self, _: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None, **__: object) -> str:
        for path in self.repository.rglob("*"):
            name = str(path.relative_to(self.repository))
            if path.is_file() and list(
                filter_repo_objects([name], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            ):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    @property
    def downloaded(self) -> set[str]:
        return {str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], FakeHub]:
    def put(repository: Path) -> FakeHub:
        fake = FakeHub(repository, tmp_path / "cache")
        fake.cache.mkdir()
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
        monkeypatch.setattr(module, "snapshot_download", fake.download)
        return fake

    return put


def test_rehearsal_downloads_no_weights(hub: Callable[[Path], FakeHub], clip: Path) -> None:
    fake = hub(clip)
    rehearsal = open_checkpoint("somebody/tower", random_weights=True)
    assert fake.downloaded == {"config.json"}
    assert rehearsal.revision == "c0ffee"
    assert open_checkpoint("somebody/tower").load_model()
    assert fake.downloaded == {"config.json", "model.safetensors"}


def test_only_the_shards_with_the_tower_are_downloaded(
    hub: Callable[[Path], FakeHub], clip: Path, tmp_path: Path
) -> None:
    repository = Path(shutil.copytree(clip, tmp_path / "repository"))
    tower = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    tower = {f"vision_tower.{name.removeprefix('vision_model.')}": tensor for name, tensor in tower.items()}
    save_file({"lm_head.weight": torch.zeros(4)}, repository / "model-1.safetensors")
    save_file(tower, repository / "model-2.safetensors")
    weight_map = {"lm_head.weight": "model-1.safetensors"} | dict.fromkeys(tower, "model-2.safetensors")
    (repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fake = hub(repository)
    assert open_checkpoint("somebody/model").load_model()
    assert fake.downloaded == {"config.json", "model.safetensors.index.json", "model-2.safetensors"}


def test_pickles_on_the_hub_are_not_downloaded_unless_allowed(
    hub: Callable[[Path], FakeHub], clip: Path, tmp_path: Path
) -> None:
    repository = Path(shutil.copytree(clip, tmp_path / "repository"))
    torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    fake = hub(repository)
    with pytest.raises(
        CheckpointError, match=r"If somebody/model has its weights in pytorch_model\.bin, pass --allow-p"
    ):
        open_checkpoint("somebody/model")
    assert fake.downloaded == {"config.json"}
    assert open_checkpoint("somebody/model", trust=Trust(allow_pickle=True)).load_model()


@pytest.fixture
def remote(clip: Path, tmp_path: Path) -> Path:
    """Write a checkpoint whose own code leaves a mark when it runs."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    folder = copy(clip, tmp_path / "remote", auto_map=auto_map)
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import CLIPVisionConfig, CLIPVisionModel\n"
        f"Path({str(tmp_path / 'mark')!r}).mkdir(exist_ok=True)\n"
        "class OwnConfig(CLIPVisionConfig):\n    pass\n"
        "class OwnModel(CLIPVisionModel):\n    config_class = OwnConfig\n"
    )
    return folder


def test_own_code_is_refused_without_running_it(remote: Path) -> None:
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        open_checkpoint(str(remote)).load_model()
    assert not (remote.parent / "mark").exists()


def test_own_code_runs_when_it_is_trusted(remote: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(remote.parent / "modules"))
    model = open_checkpoint(str(remote), trust=Trust(remote_code=True)).load_model()
    assert type(model).__name__ == "OwnModel"
    assert (remote.parent / "mark").exists()
    expected = open_checkpoint(str(clip)).load_model()
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the hub by a server that accepts connections and never answers, like a firewall that drops packets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(module, "HUB_TIMEOUT_S", 0.5)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        yield
        for connection in connections:
            connection.close()


def test_unreachable_hub_names_both_ways_out_within_seconds(silent_hub: None, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"could not be reached.*name its folder.*--random-weights"):
        open_checkpoint("nobody/absent-from-every-cache")
    assert time.monotonic() - start < 10


def test_invalid_hub_id_is_refused() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        open_checkpoint("not a checkpoint!")


def test_random_weights_are_the_same_every_time(clip: Path) -> None:
    torch.manual_seed(1)
    first = open_checkpoint(str(clip), random_weights=True)
    a = first.load_model()
    torch.manual_seed(2)
    b = open_checkpoint(str(clip), random_weights=True).load_model()
    assert first.random_weights
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    real = open_checkpoint(str(clip)).load_model()
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), real.parameters(), strict=True))


PUBLISHED = {
    # tokens, layers run, width, millions of parameters in the full vision model; from the models' own cards and papers
    "clip-vit-large-patch14-336": (577, 23, 1024, 304),
    "clip-vit-large-patch14": (257, 23, 1024, 303),
    "clip-vit-base-patch32": (50, 11, 768, 87),
    "clip-vit-base-patch16": (197, 11, 768, 86),
    "dinov2-small": (1370, 11, 384, 22),
    "dinov2-base": (1370, 11, 768, 87),
    "dinov2-large": (1370, 23, 1024, 304),
    "dinov2-with-registers-large": (1374, 23, 1024, 304),
    "siglip-so400m-patch14-224": (256, 26, 1152, 428),
    "siglip-so400m-patch14-384": (729, 26, 1152, 428),
    "llava-v1.5-7b": (577, 23, 1024, 304),
    "llava-v1.5-13b": (577, 23, 1024, 304),
    "llava-v1.6-vicuna-7b": (577, 23, 1024, 304),
    "vip-llava-7b-hf": (577, 23, 1024, 304),
    "VILA1.5-3b": (729, 26, 1152, 428),
    "NVILA-8B": (1024, 26, 1152, 429),
    "paligemma-3b-pt-224": (256, 27, 1152, 428),
    "paligemma-3b-pt-448": (1024, 27, 1152, 429),
    "openvla-7b": (256, 26, 2176, 731),  # 304 of DINOv2 and 428 of SigLIP
    "llava-1.5-7b-hf": (577, 23, 1024, 304),
    "gemma-3-4b-it": (4096, 27, 1152, 417),
    "InternVL3-1B-hf": (1025, 24, 1024, 304),
    "pi0_base": (256, 27, 1152, 428),
    "pi05_base": (256, 27, 1152, 428),
    "pi0fast-base": (256, 27, 1152, 428),
    "smolvla_base": (1024, 12, 768, 86),
    "GR00T-N1.5-3B": (256, 27, 1152, 428),
    "GR00T-N1.6-3B": (324, 27, 1152, 412),  # SigLIP 2's 428 without the pooling head
    "SmolVLM2-500M-Video-Instruct": (1024, 12, 768, 86),  # SigLIP's 93 without the pooling head
}

PROJECTED = {
    "pi0_base": (256, 2048),
    "pi05_base": (256, 2048),
    "pi0fast-base": (256, 2048),
    "smolvla_base": (64, 960),
    "GR00T-N1.5-3B": (256, 2048),
    "GR00T-N1.6-3B": (81, 2048),
    "openvla-7b": (256, 4096),
    "llava-v1.5-7b": (576, 4096),
    "llava-1.5-7b-hf": (576, 4096),
    "llava-v1.5-13b": (576, 5120),
    "llava-v1.6-vicuna-7b": (576, 4096),
    "vip-llava-7b-hf": (576, 4096),
    "VILA1.5-3b": (196, 2560),
    "paligemma-3b-pt-224": (256, 2048),
    "paligemma-3b-pt-448": (1024, 2048),
    "gemma-3-4b-it": (256, 2560),
    "InternVL3-1B-hf": (256, 896),
    "SmolVLM2-500M-Video-Instruct": (64, 960),
}
"""Tokens and width of the features that the language models of recipes read."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_projector_that_was_published_or_says_that_it_has_none(name: str) -> None:
    checkpoint, options = open_checkpoint(name, random_weights=True), ExportOptions(head="projector")
    if name in PROJECTED:
        head = describe_tower(checkpoint, options).head
        assert head
        assert (head.tokens, head.width) == PROJECTED[name]
        return
    with pytest.raises(CheckpointError, match=f"the recipe {name} describes a tower and no projector, so none can be"):
        describe_tower(checkpoint, options)


def test_recipes_are_these() -> None:
    assert {recipe.name for recipe in all_recipes()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_architecture_that_was_published(name: str) -> None:
    checkpoint = open_checkpoint(name, random_weights=True)
    assert checkpoint.recipe
    spec = checkpoint.spec()
    with torch.device("meta"):
        model = checkpoint.family.vision_class(checkpoint.config)
    millions = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    assert (spec.num_tokens, spec.depth, spec.width, millions) == PUBLISHED[name]
