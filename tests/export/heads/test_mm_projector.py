"""The projectors of the original LLaVA, LLaVA-NeXT and VILA, compared with their arithmetic written out here.

`make clients` compares every type with the real code of the three repositories, which is no package to install here.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.conftest import IMAGE_SIZE, WIDTH
from tests.export.heads.original import MLP, TEXT, Tensors, draw, write_llava, write_vila
from trtower import VisionTower
from trtower.errors import CheckpointError
from trtower.spec import BatchProfile
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.graph.reference import UncutTower
from trtower_export.heads.mm_projector import Downsample
from trtower_export.pipeline import ExportOptions, export_tower

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 3
Write = Callable[..., Path]


def linear(tensors: Tensors, name: str, features: Tensor) -> Tensor:
    return functional.linear(features, tensors[f"{name}weight"], tensors[f"{name}bias"])


@pytest.fixture
def llava(tmp_path: Path) -> Write:
    return partial(write_llava, tmp_path / "llava", tmp_path / "clip")


@pytest.fixture
def vila(tmp_path: Path) -> Write:
    return partial(write_vila, tmp_path / "vila")


def images() -> Tensor:
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(folder: Path) -> tuple[Tensor, Tensor, UncutTower]:
    """Return the tokens that the projector gets, what the cut tower makes of the images, and the uncut tower."""
    checkpoint = open_checkpoint(str(folder))
    uncut = UncutTower.load(checkpoint, describe_tower(checkpoint, ExportOptions(head="projector")))
    (layer,) = uncut.spec.layers
    tokens = checkpoint.family.read_states(uncut.model, images())[layer][:, uncut.spec.first_read :]
    return tokens, uncut.cut()(images()), uncut


def mlp(tokens: Tensor) -> Tensor:
    return linear(MLP, "2.", functional.gelu(linear(MLP, "0.", tokens)))


def test_llavas_mlp(llava: Write) -> None:
    tokens, found, uncut = run(llava(MLP, mm_projector_type="mlp2x_gelu"))
    assert torch.equal(found, mlp(tokens))
    assert uncut.spec.head
    assert (uncut.spec.head.name, uncut.spec.head.tokens, uncut.spec.head.width) == ("mlp2x_gelu", SIDE**2, TEXT)


def test_linear_is_the_default(llava: Write) -> None:
    tensors = draw(weight=(TEXT, WIDTH), bias=(TEXT,))
    tokens, found, _ = run(llava(tensors))
    assert torch.equal(found, linear(tensors, "", tokens))


def test_llava_nexts_residual_blocks_follow_the_mlp(llava: Write) -> None:
    names: dict[str, tuple[int, ...]] = {"3_pre_norm_weight": (TEXT,), "3_pre_norm_bias": (TEXT,)}
    names |= {f"3_proj_{place}_weight": (TEXT, TEXT) for place in (0, 2)}
    names |= {f"3_proj_{place}_bias": (TEXT,) for place in (0, 2)}
    block = draw(**names)
    tokens, found, _ = run(llava(MLP | block, mm_projector_type="mlp2x_res1x_gelu"))
    normed = functional.layer_norm(mlp(tokens), (TEXT,), block["3.pre_norm.weight"], block["3.pre_norm.bias"])
    expected = normed + linear(block, "3.proj.2.", functional.gelu(linear(block, "3.proj.0.", normed)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_identity_has_no_weights(llava: Write) -> None:
    tokens, found, uncut = run(llava({}, mm_projector_type="identity", hidden_size=WIDTH))
    assert torch.equal(found, tokens)
    assert not uncut.head_sha256()


def blocks(tokens: Tensor, side: int) -> Tensor:
    """Put side x side patches side by side, one by one; the grid is filled up with zeros."""
    rows = []
    for row in range(-(-SIDE // side)):
        for column in range(-(-SIDE // side)):
            parts = []
            for down in range(side):
                for across in range(side):
                    y, x = row * side + down, column * side + across
                    inside = y < SIDE and x < SIDE
                    parts.append(tokens[:, y * SIDE + x] if inside else torch.zeros_like(tokens[:, 0]))
            rows.append(torch.cat(parts, dim=-1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("side", [2, 3])
def test_downsampling_fills_odd_grids_with_zeros(side: int) -> None:
    tokens = torch.randn(2, SIDE**2, 5)
    assert torch.equal(Downsample(side)(tokens), blocks(tokens, side))


@pytest.mark.parametrize(("kind", "side", "inner"), [
    ("mlp_downsample", 2, []),
    ("mlp_downsample_2x2_fix", 2, []),
    ("mlp_downsample_3x3_fix", 3, [3 * WIDTH]),
    ("mlp_downsample_3x3_s2", 3, [3 * WIDTH, WIDTH, WIDTH // 3]),
    ("mlp_downsample_3x3_s2_new", 3, [4 * WIDTH, 2 * WIDTH, WIDTH, WIDTH // 3]),
])  # fmt: skip
def test_vilas_downsampling_projectors(kind: str, side: int, inner: list[int], vila: Write) -> None:
    widths = [side**2 * WIDTH, *inner, TEXT]
    names: dict[str, tuple[int, ...]] = {}
    for place, (before, after) in enumerate(pairwise(widths)):
        at = 1 + 3 * place
        names |= {f"{at}_weight": (before,), f"{at}_bias": (before,)}
        names |= {f"{at + 1}_weight": (after, before), f"{at + 1}_bias": (after,)}
    last = 1 + 3 * (len(widths) - 1)
    tensors = draw(**names, **{f"{last}_weight": (TEXT, TEXT), f"{last}_bias": (TEXT,)})
    tokens, found, uncut = run(vila(tensors, kind))
    expected = blocks(tokens, side)
    for place, width in enumerate(widths[:-1]):
        at = 1 + 3 * place
        expected = functional.layer_norm(expected, (width,), tensors[f"{at}.weight"], tensors[f"{at}.bias"])
        expected = functional.gelu(linear(tensors, f"{at + 1}.", expected))
    expected = linear(tensors, f"{last}.", expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert uncut.spec.head
    assert (uncut.spec.head.name, uncut.spec.head.tokens) == (kind, (-(-SIDE // side)) ** 2)


def test_bundle_of_a_vila_holds_its_projector(vila: Write, tmp_path: Path) -> None:
    folder = vila(MLP, "mlp2x_gelu")
    _, expected, _ = run(folder)
    options = ExportOptions(
        head="projector", precision="fp32", flavour="none", profiles=(BatchProfile(min=1, opt=2, max=2),)
    )
    bundle = export_tower(str(folder), tmp_path / "b", options)
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
    found = VisionTower.load(bundle.path, "onnxruntime-cpu")(images())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "message"), [
    ({"s2": True}, "with s2 its projector reads the merged map of several scales"),
    ({"dynamic_s2": True}, "with dynamic_s2 its projector reads the merged map of several scales"),
    ({"mm_resampler_type": "qformer"}, "its mm_resampler_type 'qformer' is a network between tower and projector"),
    ({"mm_projector_type": "pooler"}, "its mm_projector_type 'pooler' is none that trtower exports"),
    ({"mm_projector_type": "mlp0x_gelu"}, "its mm_projector_type 'mlp0x_gelu' is none that trtower exports"),
    ({"hidden_size": None}, "its config.json has hidden_size=None, where its projector needs a number of features"),
    ({"mm_hidden_size": WIDTH - 1}, r"mlp2x_gelu does not accept 9 tokens of 64, which it gets from hidden state 3"),
    ({"hidden_size": TEXT + 1}, r"mm_projector\.0\.bias has shape \(40,\); its config expects \(41,\)"),
])  # fmt: skip
def test_projectors_that_no_engine_can_hold_are_refused(config: dict[str, Any], message: str, llava: Write) -> None:
    folder = llava(MLP, **{"mm_projector_type": "mlp2x_gelu", **config})
    with pytest.raises(CheckpointError, match=message):
        run(folder)


def test_projector_without_weights_is_refused(llava: Write) -> None:
    with pytest.raises(CheckpointError, match=r"holds no mm_projector, the weights of the mm_projector\. Export a"):
        run(llava({}, mm_projector_type="mlp2x_gelu"))


def test_projector_with_too_few_layers_is_refused(llava: Write) -> None:
    with pytest.raises(CheckpointError, match=r"mm_projector\.4\.bias is missing"):
        run(llava(MLP, mm_projector_type="mlp3x_gelu"))


def test_projector_with_too_many_layers_is_refused(llava: Write) -> None:
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.bias is not a part of the mm_projector that its"):
        run(llava(MLP, mm_projector_type="linear"))
