"""The named one of several towers in a checkpoint is exported, and found again for the check."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import make_model
from tests.export.checkpoint.test_layouts import LLAMA, assert_same_tower, doubled, states
from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import export_command
from trtower.cli import run
from trtower.errors import CheckpointError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.pipeline import ExportOptions, export_tower


@pytest.fixture
def video_llava(tmp_path: Path) -> Path:
    """Write a transformers model with two CLIPs; the weights of the one for videos are doubled."""
    image, video = make_model("clip"), doubled(make_model("clip"))
    config = transformers.VideoLlavaConfig(vision_config=image.config.to_dict(), text_config=LLAMA)
    model = transformers.VideoLlavaForConditionalGeneration(config)
    for name, vision in (("image_tower", image), ("video_tower", video)):
        inner = next(module for path, module in model.named_modules() if path.endswith(name))
        inner.load_state_dict(states(vision, inner))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_two_towers_are_listed_with_the_option_that_chooses(video_llava: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds 2 towers: .*--tower \S*image_tower\S* or --tower \S*video_tower"):
        open_checkpoint(str(video_llava))


def test_named_tower_is_opened(video_llava: Path) -> None:
    for name, vision in (("image_tower", make_model("clip")), ("video_tower", doubled(make_model("clip")))):
        root = open_checkpoint(str(video_llava), tower=name).layout.root
        for tower in (name, f"model.{name}", root.rstrip("."), root):
            checkpoint = open_checkpoint(str(video_llava), tower=tower)
            model = checkpoint.load_model(checkpoint.spec(-2, "patch"))
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), vision.parameters(), strict=True))


def test_wrong_name_lists_the_towers(video_llava: Path, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no tower 'audio_tower'; it has \S*image_tower\S* and \S*video_tower"
    ):
        open_checkpoint(str(video_llava), tower="audio_tower")
    with pytest.raises(CheckpointError, match=r"'tower'; it has|is a single tower and nothing else: leave out --tower"):
        open_checkpoint(str(checkpoints["clip"]), tower="tower")


def test_name_that_fits_both_chooses_neither(video_llava: Path) -> None:
    path = video_llava / "model.safetensors"
    save_file({f"net.{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="holds 2 towers"):
        open_checkpoint(str(video_llava), tower="net")


def test_check_and_doctor_find_the_tower_again(
    video_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ExportOptions(
        flavour="none", select_layer=-2, select_feature="patch", tower="video_tower", precision="fp32"
    )
    bundle = export_tower(str(video_llava), tmp_path / "b", options)
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
    assert bundle.manifest.source.tower == "video_tower"
    assert "--tower video_tower" in export_command(bundle, -1, 42)
    assert run(["check", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert run(["check", str(tmp_path / "b"), "--tower", "image_tower"]) == 1
    assert "are not the ones that" in capsys.readouterr().err
    assert Bundle.open(tmp_path / "b").manifest.certificate
    chosen = ["--tower", "image_tower", "--select-layer=-2"]
    assert run(["doctor", str(video_llava), *chosen, "--error-images", "0"]) == 0
    assert "image_tower" in capsys.readouterr().err


def test_tower_with_its_own_config_is_read_with_it(tmp_path: Path) -> None:
    """A checkpoint may have one config per tower, even of different families."""
    clip, gelu = make_model("clip"), make_model("clip-gelu")
    config = transformers.LlavaConfig(vision_config=clip.config.to_dict(), text_config=LLAMA)
    tensors = {f"vision_tower.{n.removeprefix('vision_model.')}": t for n, t in clip.state_dict().items()}
    tensors |= {f"video_tower.{n.removeprefix('vision_model.')}": t * 2 for n, t in gelu.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    written = {**config.to_dict(), "video_config": gelu.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert_same_tower(open_checkpoint(str(tmp_path), tower="vision_tower"), clip, (3,))
    video = open_checkpoint(str(tmp_path), tower="video_tower")
    assert video.config.hidden_act == "gelu"
    assert_same_tower(video, doubled(gelu), (3,))
