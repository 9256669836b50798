"""Small but real checkpoints, written by transformers, and bundles that the pipeline exports from them."""

import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._export.utils
import torch.fx.config
import transformers
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests.timm_stand_in import SIZES
from trtower.bundle.bundle import Bundle
from trtower.layer_codes import LayerCode
from trtower.parity.verify import verify_bundle
from trtower.spec import BatchProfile
from trtower.tower.vision_tower import VisionTower
from trtower_export.bench.ceiling import SIZE
from trtower_export.checkpoint import timm
from trtower_export.pipeline import ExportOptions, export_tower

collect_ignore = ["tensorrt"]  # it needs other environments, which `make test-tensorrt` makes

# Tests trace hundreds of towers: a third of that was looking for garbage, reading torch's tables of operators again,
# and noting the source of every operation.
gc.set_threshold(100_000, 50, 100)
torch.fx.config.do_not_emit_stack_traces = True
torch._export.utils._materialize_cpp_cia_ops = cache(torch._export.utils._materialize_cpp_cia_ops)
ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]
SIZE["cpu"] = 256  # rows of the products that `bench` measures the ceiling with: its own take a second each

NUM_LAYERS = 4
IMAGE_SIZE = 42
PATCH_SIZE = 14
WIDTH = 64
BATCH = BatchProfile(min=1, opt=2, max=4)
Bundles = Callable[..., Path]
CHOSEN_ON_A_CPU = "openvino"
"""The backend that `auto` chooses there."""


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trtower know the sizes of the stand-ins for timm's ViTs."""
    for name, size in SIZES.items():
        monkeypatch.setitem(timm.SIZES, name, size)


SHAPE: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
PATCHES = SHAPE | {"patch_size": PATCH_SIZE}
IMAGES = PATCHES | {"image_size": IMAGE_SIZE}
PAIRS = SHAPE | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2}
MLP = {"intermediate_size": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPVisionModel", IMAGES | MLP | {"hidden_act": "quick_gelu"}),
    "clip-gelu": ("CLIPVisionModel", IMAGES | MLP | {"hidden_act": "gelu"}),
    "metaclip_2": ("MetaClip2VisionModel", IMAGES | MLP),
    "siglip": ("SiglipVisionModel", IMAGES | MLP),
    "siglip2": ("Siglip2VisionModel", PATCHES | MLP | {"num_patches": 9}),
    "dinov2": ("Dinov2Model", IMAGES | {"mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2Model", IMAGES | {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGES | {"mlp_ratio": 2, "num_register_tokens": 3}),
    "dinov3_vit": ("DINOv3ViTModel", IMAGES | MLP | {"num_register_tokens": 3}),
    "dinov3_vit-gated": ("DINOv3ViTModel", IMAGES | MLP | {"use_gated_mlp": True, "hidden_act": "silu"}),
    "internvl_vision": ("InternVLVisionModel", PAIRS | MLP | {"use_mask_token": True}),
    "internvl_vision-rms": ("InternVLVisionModel", PAIRS | MLP | {"norm_type": "rms_norm", "use_qk_norm": True}),
    "internvl_vision-normed": ("InternVLVisionModel", PAIRS | MLP | {"use_mean_pooling": False}),
    "internvl_vision-unplaced": ("InternVLVisionModel", PAIRS | MLP | {"use_absolute_position_embeddings": False}),
    "aimv2": ("Aimv2VisionModel", IMAGES | MLP),
    "aimv2-native": ("Aimv2VisionModel", IMAGES | MLP | {"is_native": True}),
    "eva_clip": ("Blip2VisionModel", IMAGES | MLP),
    "idefics3_vision": ("Idefics3VisionTransformer", IMAGES | MLP),
    "smolvlm_vision": ("SmolVLMVisionTransformer", IMAGES | MLP),
}
"""Small towers by family and variant: the transformers class and its config."""

IS_OLD = int(transformers.__version__.partition(".")[0]) < 5
POSITIONS = "transformers 4.57 computes wrong positions for Idefics3's and SmolVLM's towers, which are refused"
REFUSED = {"idefics3_vision", "smolvlm_vision"} if IS_OLD else set[str]()
for _name in REFUSED:
    del MODELS[_name]
PLAIN = {"clip-gelu", "internvl_vision-normed", "internvl_vision-unplaced", "smolvlm_vision"}
"""Variants whose graphs add nothing to those of others."""
DISTINCT = [name for name in MODELS if name not in PLAIN]


TOWERS = tuple(
    name
    for name in ("clip", "dinov2", "siglip", "internvl_vision-normed", "eva_clip", "idefics3_vision", "smolvlm_vision")
    if name in MODELS
)
"""The models that the fixture `checkpoints` saves."""


def make_model(name: str, **changes: object) -> transformers.PreTrainedModel:
    """Make a small tower with random weights in which every layer matters; default ones hardly change the residuals.

    ``changes`` are fields of its config.
    """
    torch.manual_seed(7)
    class_name, options = MODELS[name]
    model_class = getattr(transformers, class_name)
    model: transformers.PreTrainedModel = model_class(model_class.config_class(**options | changes))
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        elif parameter_name.endswith("weight") or "lambda" in parameter_name:  # norms and layer scales
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pytest_configure(config: pytest.Config) -> None:
    """Limit each pytest-xdist process to one thread; otherwise their threads wait for each other."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the user's cache and the plans stored in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _process_as_found() -> Iterator[None]:
    """Fail the test that leaves gradients or autocast changed, not one that comes later in the same process."""
    before = _settings()
    yield
    assert _settings() == before


def _settings() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a 1 MiB disk: the graph fits, but not the plan, which has kernels as well as weights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True)  # noqa: S607
    if mounted.returncode:
        pytest.skip(f"not allowed to mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)  # noqa: S607


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch in one thread: for small towers on a busy machine, starting threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for family in TOWERS:
        make_model(family).save_pretrained(root / f"tiny-{family}")
    return {family: root / f"tiny-{family}" for family in TOWERS}


State = dict[Path, tuple[int, int]]
SHARED: dict[Path, State] = {}
"""The bundles that tests share, as they were exported."""


def state_of(bundle: Path) -> State:
    """Return what changes whenever somebody writes, adds or removes a file of the bundle."""
    files = {path: path.stat() for path in bundle.rglob("*") if path.is_file()}
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in files.items()}


@pytest.fixture(autouse=True)
def nobody_changes_what_is_shared() -> Iterator[None]:
    """Fail the test that changes a shared bundle; otherwise a later one fails, depending on the order."""
    yield
    changed = [bundle for bundle in SHARED if state_of(bundle) != SHARED[bundle]]
    for bundle in changed:
        SHARED[bundle] = state_of(bundle)
    assert not changed, "this test writes into shared bundles; let it take the fixture `spoilt`, or a copy"


@pytest.fixture(scope="session")
def export(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that exports a bundle by family and options, each only once; tests must not change bundles."""
    exported: dict[tuple[object, ...], Path] = {}

    def get(family: str = "clip", **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in exported:
            out = tmp_path_factory.mktemp("bundles") / f"tiny-{family}"
            settings: dict[str, Any] = {"profiles": (BATCH,), "check": False, **options}
            exported[key] = export_tower(str(checkpoints[family]), out, ExportOptions(**settings)).path
            SHARED[exported[key]] = state_of(exported[key])
        return exported[key]

    return get


@pytest.fixture(scope="session")
def bundles(export: Callable[..., Path]) -> Bundles:
    """Return a function that exports a bundle without a plan, by tower, layer and precision."""

    def get(tower: str = "clip", layer: LayerCode = -2, precision: str = "fp32", **options: object) -> Path:
        code = tuple(layer) if isinstance(layer, list) else layer
        return export(tower, select_layer=code, precision=precision, flavour="none", **options)

    return get


@pytest.fixture(scope="session")
def clip_bundle(export: Callable[..., Path]) -> Path:
    """A CLIP bundle in FP16, hidden state -2, with a TensorRT-RTX plan."""
    return export("clip")


@pytest.fixture(scope="session")
def fp32_bundle(export: Callable[..., Path]) -> Path:
    return export("clip", precision="fp32", flavour="none")


@pytest.fixture(scope="session")
def certified(fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was verified on two backends."""
    copy = Path(shutil.copytree(fp32_bundle, tmp_path_factory.mktemp("certified") / "tower"))
    for backend in (CHOSEN_ON_A_CPU, "onnxruntime-cpu"):
        assert verify_bundle(Bundle.open(copy), backend=backend).manifest.certificates[-1].passed
    return copy


@pytest.fixture
def spoilt(clip_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy of the CLIP bundle that a test may damage."""
    return Path(shutil.copytree(clip_bundle, tmp_path / "bundle"))


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[VisionTower], list[int]]:
    """Return a function that records how many images each engine call of a tower has."""

    def watch(tower: VisionTower) -> list[int]:
        calls: list[int] = []
        run = tower.runner.run

        def count(pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
            calls.append(len(pixel_values))
            run(pixel_values, hidden_states)

        monkeypatch.setattr(tower.runner, "run", count)
        return calls

    return watch
