import pytest

from trtower.errors import ConfigError, InputError
from trtower.spec import BatchProfile, TowerSpec, normalise_layers


def spec(**changes: object) -> TowerSpec:
    values = {
        "family": "clip",
        "image_size": 336,
        "patch_size": 14,
        "num_layers": 24,
        "num_prefix_tokens": 1,
        "width": 1024,
        "layers": (23,),
    }
    return TowerSpec(**{**values, **changes})


def test_negative_layer_counts_embeddings() -> None:
    assert normalise_layers(-2, 24) == (23,)
    assert normalise_layers(-25, 24) == (0,)
    assert normalise_layers(-1, 24) == normalise_layers(24, 24) == (24,)


def test_a_list_keeps_its_order() -> None:
    assert normalise_layers([-2, 0, 8], 12) == (11, 0, 8)


@pytest.mark.parametrize("layer", [-26, 25, -30])
def test_layer_outside_the_tower_names_the_range(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"select_layer={layer} is outside this tower: 24 layers accept -25 to 24\."):
        normalise_layers(layer, 24)


@pytest.mark.parametrize("layer", [[], "slicefour", True, [1.0]])
def test_what_is_no_layer_is_refused(layer: object) -> None:
    with pytest.raises(ConfigError):
        normalise_layers(layer, 24)  # type: ignore[arg-type]


def test_counts_are_those_of_clip_large_at_336() -> None:
    tower = spec()
    assert (tower.num_patches_per_side, tower.num_patches, tower.num_tokens, tower.hidden_size) == (24, 576, 577, 1024)


def test_width_is_the_sum_over_the_layers_read() -> None:
    assert spec(layers=(12, 23)).hidden_size == 2048
    assert spec(layers=(12, 23)).depth == 23


def test_patch_drops_every_prefix_token() -> None:
    assert spec(num_prefix_tokens=5).first_token("patch") == 5
    assert spec(num_prefix_tokens=5).first_token("cls_patch") == 0


def test_unknown_feature_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="patch and cls_patch are known"):
        spec().first_token("cls")


def test_cls_patch_needs_a_cls_token() -> None:
    with pytest.raises(ConfigError, match="needs a CLS token"):
        spec(num_prefix_tokens=0, select_feature="cls_patch")


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
    with pytest.raises(InputError, match="takes 4 to 8"):
        list(BatchProfile(min=4, opt=4, max=8).pieces(3))
