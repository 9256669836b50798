"""Real parts in small: checkpoints that transformers wrote, bundles that the pipeline made of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from trtower.spec import BatchProfile
from trtower_export.pipeline import ExportOptions, export_tower

NUM_LAYERS = 4
IMAGE_SIZE = 42
PATCH_SIZE = 14
WIDTH = 64
BATCH = BatchProfile(min=1, opt=2, max=4)


def make_model(family: str) -> torch.nn.Module:
    """Draw a small tower whose every layer matters: default initialisation leaves residuals almost untouched."""
    torch.manual_seed(7)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    shape |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    if family == "clip":
        config = transformers.CLIPVisionConfig(**shape, intermediate_size=128, hidden_act="quick_gelu")
        model = transformers.CLIPVisionModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**shape, mlp_ratio=2))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif "lambda" not in name and "weight" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for family in ("clip", "dinov2"):
        make_model(family).save_pretrained(root / f"tiny-{family}")
    return {family: root / f"tiny-{family}" for family in ("clip", "dinov2")}


@pytest.fixture(scope="session")
def export(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give bundles by family and options; each is exported once and must not be changed."""
    made: dict[tuple[object, ...], Path] = {}

    def get(family: str = "clip", **options: object) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("bundles") / f"tiny-{family}"
            settings = ExportOptions(**{"batch": BATCH, "check": False, **options})
            made[key] = export_tower(str(checkpoints[family]), out, settings).path
        return made[key]

    return get


@pytest.fixture(scope="session")
def clip_bundle(export: Callable[..., Path]) -> Path:
    """FP16, hidden state -2, with a TensorRT-RTX plan."""
    return export("clip")


@pytest.fixture(scope="session")
def fp32_bundle(export: Callable[..., Path]) -> Path:
    return export("clip", precision="fp32", flavour="none")


@pytest.fixture
def spoilt(clip_bundle: Path, tmp_path: Path) -> Path:
    """Give a copy of the CLIP bundle that a test may damage."""
    return Path(shutil.copytree(clip_bundle, tmp_path / "bundle"))
