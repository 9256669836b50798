"""What vLLM is given in place of pictures; tests/serving/test_llm_servers.py gives it to vLLM's own code."""

import base64
import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import CHOSEN_ON_A_CPU
from tests.export.heads.models import IS_OLD, NUM_PATCHES, TEXT_WIDTH, features, make
from tests.pictures import picture
from tests.runtime.serving.conftest import Projected
from trtower import ConfigError, InputError, VisionTower
from trtower.head import HeadSpec
from trtower.serving.projected import projector_of
from trtower.serving.vllm import content_parts, image_embeds


def load(bundle: Any) -> VisionTower:
    return VisionTower.load(bundle, CHOSEN_ON_A_CPU)


def read(part: dict[str, str]) -> torch.Tensor:
    """Read a part as vLLM's server does."""
    content = base64.b64decode(part["image_embeds"], validate=True)
    tensor: torch.Tensor = torch.load(io.BytesIO(content), weights_only=True)
    return tensor


def test_features_are_those_that_the_language_model_receives(projected: Projected) -> None:
    tower = load(projected("llava"))
    pictures = [picture(seed) for seed in range(3)]
    embeds = image_embeds(tower, pictures)
    assert embeds.shape == (3, NUM_PATCHES, TEXT_WIDTH)
    pixel_values = tower.image_processor(pictures, return_tensors="pt")["pixel_values"]
    expected = features(make("llava"), "llava", pixel_values)
    assert (embeds - expected).abs().max() < 1e-5 * expected.abs().max()
    assert image_embeds(tower, pictures[0]).shape == (1, NUM_PATCHES, TEXT_WIDTH)


def test_server_gets_one_part_for_each_picture(projected: Projected) -> None:
    embeds = image_embeds(load(projected("llava", precision="fp16")), [picture(0), picture(1)])
    parts = content_parts(embeds)
    assert [part["type"] for part in parts] == ["image_embeds", "image_embeds"]
    for part, expected in zip(parts, embeds, strict=True):
        assert torch.equal(read(part), expected)
        assert read(part).dtype == torch.float16
        assert len(base64.b64decode(part["image_embeds"])) < 2 * expected.nbytes + 2000  # not the whole batch
    assert content_parts(embeds[0]) == parts[:1]


def test_other_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"embeds has shape \(4,\); expected \(pictures, tokens, width\)"):
        content_parts(torch.zeros(4))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "its Gemma3ForConditionalGeneration takes no image_embeds. Give it pictures"),
        ("llava_next", "its LlavaNextForConditionalGeneration wants the tiles of a picture packed already"),
        ("internvl", "whether it takes features of InternVLMultiModalProjector as they are was not found out"),
    ],
)
def test_model_that_vllm_gives_no_features_is_refused(projected: Projected, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        image_embeds(load(projected(name)), picture(0))


def test_bundle_without_a_projector_is_refused(projected: Projected) -> None:
    with pytest.raises(ConfigError, match="was exported without a head, but vLLM wants features after the model's pro"):
        image_embeds(load(projected("llava", head="none")), picture(0))


def test_divided_features_are_refused_for_every_server() -> None:
    head = HeadSpec(kind="projector", name="PaliGemmaMultiModalProjector", width=8, tokens=9, divisor=45.25)
    bundle: Any = SimpleNamespace(path="b", manifest=SimpleNamespace(spec=SimpleNamespace(head=head)))
    for server in ("vLLM", "Dynamo"):
        with pytest.raises(ConfigError, match=f"b divides its features by 45.25, .* and {server} does not multiply"):
            projector_of(bundle, server)
    bundle.manifest.spec.head = replace(head, divisor=1.0)
    assert projector_of(bundle, "vLLM").divisor == 1


def test_features_that_vllm_would_scale_otherwise_are_refused(projected: Projected) -> None:
    tower = load(projected("paligemma"))
    if not IS_OLD:
        assert image_embeds(tower, picture(0)).shape[0] == 1
        return
    with pytest.raises(ConfigError, match=r"divides its features by .* and vLLM does not multiply"):
        image_embeds(tower, picture(0))
