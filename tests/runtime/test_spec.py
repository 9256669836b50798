from typing import Any

import pytest

from trtower.errors import ConfigError, InputError
from trtower.spec import BatchProfile, TowerSpec, merge_profiles, profile_batches


def spec(**changes: Any) -> TowerSpec:
    values: dict[str, Any] = {
        "family": "clip",
        "image_size": 336,
        "patch_size": 14,
        "num_layers": 24,
        "num_prefix_tokens": 1,
        "width": 1024,
        "layers": (23,),
    }
    return TowerSpec(**{**values, **changes})


def test_counts_are_those_of_clip_large_at_336() -> None:
    tower = spec()
    assert (tower.num_patches_per_side, tower.num_patches, tower.num_tokens, tower.hidden_size) == (24, 576, 577, 1024)


def test_width_is_the_sum_over_the_layers_read() -> None:
    assert spec(layers=(12, 23)).hidden_size == 2048
    assert spec(layers=(12, 23)).depth == 23


def test_last_hidden_state_needs_the_last_layer_and_the_norm() -> None:
    tower = spec(layers=(12, 25))
    assert (tower.depth, tower.reads_final_norm, tower.hidden_size) == (24, True, 2048)
    assert not spec(layers=(24,)).reads_final_norm


def test_columns_are_in_the_order_of_the_layers_requested() -> None:
    tower = spec(layers=(22, 4, 25), width=8)
    assert tower.columns((25, 22)) == [slice(16, 24), slice(0, 8)]


@pytest.mark.parametrize("layers", [(), (26,), (-1,)])
def test_layers_that_are_not_hidden_states_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="expected some of 0 to 25"):
        spec(layers=layers)


def test_patch_drops_every_prefix_token() -> None:
    assert spec(num_prefix_tokens=5).first_token("patch") == 5
    assert spec(num_prefix_tokens=5).first_token("cls_patch") == 0


def test_unknown_feature_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown select_feature .cls.; choose patch or cls_patch"):
        spec().first_token("cls")


def test_cls_patch_keeps_every_token_of_a_tower_without_cls() -> None:
    tower = spec(num_prefix_tokens=0, select_feature="cls_patch")
    assert tower.first_token("cls_patch") == tower.first_token("patch") == 0


@pytest.mark.parametrize("profile", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_profile_out_of_order_is_refused(profile: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="out of order"):
        BatchProfile(min=profile[0], opt=profile[1], max=profile[2])


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 4), (3, 4), (4, 4)])
def test_pieces_cover_every_image_within_the_profile(low: int, high: int) -> None:
    profile = BatchProfile(min=low, opt=high, max=high)
    for batch in range(low, 30):
        pieces = list(profile.pieces(batch))
        assert all(low <= stop - start <= high and start >= 0 for start, stop in pieces)
        assert {i for start, stop in pieces for i in range(start, stop)} == set(range(batch))


def test_batch_below_the_minimum_is_refused() -> None:
    with pytest.raises(InputError, match="accepts 4 to 8"):
        list(BatchProfile(min=4, opt=4, max=8).pieces(3))


def profiles(*numbers: tuple[int, int, int]) -> list[BatchProfile]:
    return [BatchProfile(min=low, opt=tuned, max=high) for low, tuned, high in numbers]


def test_merged_profiles_accept_every_batch_that_one_of_them_accepts() -> None:
    assert merge_profiles(profiles((1, 1, 1), (1, 8, 32))) == BatchProfile(min=1, opt=8, max=32)
    assert merge_profiles(profiles((9, 16, 32), (2, 4, 8))) == BatchProfile(min=2, opt=4, max=32)
    assert merge_profiles(profiles((1, 8, 32), (2, 2, 4), (33, 40, 48))) == BatchProfile(min=1, opt=40, max=48)
    assert profile_batches(profiles((1, 1, 1), (1, 8, 32))) == [1, 8, 32]


def test_profiles_with_a_gap_are_refused() -> None:
    with pytest.raises(ConfigError, match="batch profiles 1 8 8, 10 16 32 leave out 9 to 9 images"):
        merge_profiles(profiles((1, 8, 8), (10, 16, 32)))
