"""The cameras of a robot policy in one engine call, in transformers' own π0. LeRobot's are in tests/policies."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import trtower
from trtower.installation.policies import embed_together
from trtower_export import ExportOptions, export_tower

SIDE, TOKENS, WORDS = 28, 4, 120
VISION = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
VISION |= {
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
    "projection_dim": 64,
    "vision_use_head": False,
}
TEXT = {"model_type": "gemma", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": WORDS}
VLM = {"model_type": "paligemma", "vision_config": VISION, "text_config": TEXT, "projection_dim": 64}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small π0 with random weights, and a bundle of its tower and projector."""
    if not hasattr(transformers, "PI0Config"):
        pytest.skip("this transformers has no π0")
    folder = tmp_path_factory.mktemp("pi0")
    torch.manual_seed(0)
    config = transformers.PI0Config(
        vlm_config=VLM | {"image_token_id": WORDS - 1},
        dit_config=TEXT | {"hidden_size": 32},
        chunk_size=5,
        max_state_dim=8,
        max_action_dim=8,
    )
    model = transformers.PI0ForConditionalGeneration(config).eval()
    model.save_pretrained(folder / "model")
    options = ExportOptions(head="projector", precision="fp32", flavour="none", check=False)
    export_tower(str(folder / "model"), folder / "bundle", options)
    return model, folder / "bundle"


def observe(masks: list[list[bool]]) -> dict[str, Tensor]:
    """Make inputs of two cameras for each robot, of which some are masked, and the noise."""
    generator = torch.Generator().manual_seed(0)
    robots, text = len(masks), torch.randint(0, WORDS - 10, (len(masks), 5), generator=generator)
    ids = torch.cat([torch.full((robots, 2 * TOKENS), WORDS - 1), text], 1)
    attended = torch.ones_like(ids)
    for robot, shown in enumerate(masks):  # π0's processor pads on the left
        missing = TOKENS * shown.count(False)
        ids[robot, :missing], attended[robot, :missing] = 0, 0
    return {
        "state": torch.rand(robots, 8, generator=generator),
        "input_ids": ids,
        "attention_mask": attended,
        "pixel_values": torch.rand(robots, 2, 3, SIDE, SIDE, generator=generator) * 2 - 1,
        "pixel_attention_mask": torch.tensor(masks),
        "noise": torch.rand(robots, 5, 8, generator=generator),
    }


@pytest.mark.parametrize(
    ("masks", "run"),
    [([[True, True]], 2), ([[True, False]], 1), ([[True, True], [True, False]], 3), ([[False, False]], 2)],
)
def test_masked_cameras_are_not_run_and_change_nothing(
    policy: tuple[Any, Path], masks: list[list[bool]], run: int
) -> None:
    model, bundle = policy
    expected = model.sample_actions(**observe(masks))
    calls: list[int] = []
    with trtower.install(model, bundle, backend="onnxruntime-cpu") as installation:
        installation.tower.on_batch = lambda report: calls.append(report.batch)
        actual = model.sample_actions(**observe(masks))
    assert sum(calls) == run
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.sample_actions(**observe(masks)), expected)


def test_methods_are_the_models_own_again(policy: tuple[Any, Path]) -> None:
    model, bundle = policy
    trtower.install(model, bundle, backend="onnxruntime-cpu").uninstall()
    for module in (model.model, model.model.vlm):
        assert not {"embed_prefix", "get_image_features"} & vars(module).keys()


def test_method_that_somebody_has_patched_is_left_alone(policy: tuple[Any, Path]) -> None:
    model, bundle = policy
    calls: list[int] = []
    own: Any = model.model.embed_prefix

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    vars(model.model)["embed_prefix"] = patched
    try:
        with trtower.install(model, bundle, backend="onnxruntime-cpu"):
            model.sample_actions(**observe([[True, True]]))
        assert calls == [1]
        assert vars(model.model)["embed_prefix"] is patched
    finally:
        del vars(model.model)["embed_prefix"]


class Counting(nn.Module):
    """Embeds an image as its mean, and counts the images of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return images.mean((2, 3))[:, None]


def test_each_image_gets_its_own_features_from_one_call() -> None:
    embed, images = Counting(), [torch.rand(2, 3, 4, 4) for _ in range(3)]
    embedded = embed_together(embed, images, [torch.ones(2, dtype=torch.bool)] * 3)
    for image in reversed(images):
        torch.testing.assert_close(embedded(image), image.mean((2, 3))[:, None])
    assert embed.calls == [6]


def test_image_that_one_robot_sees_is_run_for_all() -> None:
    embed, images = Counting(), [torch.rand(2, 3, 4, 4) for _ in range(3)]
    masks = [torch.tensor(each) for each in ([True, True], [False, False], [False, True])]
    embedded = embed_together(embed, images, masks)
    assert embed.calls == [4]
    assert not embedded(images[1]).any()
    assert embedded(images[1]).shape == (2, 1, 3)
    torch.testing.assert_close(embedded(images[2]), images[2].mean((2, 3))[:, None])


def test_images_of_several_sizes_are_run_one_by_one() -> None:
    embed, images = Counting(), [torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)]
    embedded = embed_together(embed, images, [torch.ones(1, dtype=torch.bool)] * 2)
    assert [embedded(image).shape for image in images] == [(1, 1, 3)] * 2
    assert embed.calls == [1, 1]


def test_image_that_was_not_among_them_is_run() -> None:
    embed, images = Counting(), [torch.rand(1, 3, 4, 4)]
    embedded = embed_together(embed, images, [torch.ones(1, dtype=torch.bool)])
    other = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(embedded(other), other.mean((2, 3))[:, None])
    assert embed.calls == [1, 1]
