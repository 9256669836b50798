"""The options of a tower are written once, and every tower class shows them all."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest

from trtower import CLIPVisionTower, CLIPVisionTowerDynamicS2, CLIPVisionTowerS2, VisionTower, build_vision_tower
from trtower.errors import ConfigError
from trtower.tower.options import TowerKeywords, TowerOptions

PLACE = ["backend", "device"]
OTHERS = ["check_finite", "count_cls", "require_certificate", "verify", "engine"]
PICK = ["select_layer", "select_feature"]
LLAVA = ["vision_tower", "args", "delay_load", "vision_tower_cfg"]
ARGS = SimpleNamespace(mm_vision_select_layer=-2)


def test_type_checkers_read_the_actual_options() -> None:
    assert get_type_hints(TowerKeywords) == {each.name: each.type for each in fields(TowerOptions)}


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (VisionTower, ["bundle", *PICK, *PLACE, *OTHERS]),
        (VisionTower.load, ["bundle", *PLACE, *PICK, *OTHERS]),
        (VisionTower.from_pretrained, ["bundle", *PLACE, *PICK, *OTHERS]),
        *((kind, [*LLAVA, *PLACE, *OTHERS]) for kind in (CLIPVisionTower, CLIPVisionTowerS2, CLIPVisionTowerDynamicS2)),
        (CLIPVisionTower.load, ["bundle", *PLACE, *PICK, *OTHERS]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signature_shows_every_keyword_with_its_default(function: Callable[..., Any], names: list[str]) -> None:
    shown = inspect.signature(function).parameters
    assert list(shown) == names
    defaults = TowerOptions()
    for name in (*PLACE, *OTHERS):
        assert shown[name].default == getattr(defaults, name)
        assert shown[name].annotation == TowerOptions.__annotations__[name]


@pytest.mark.parametrize(
    "make",
    [
        lambda path, **options: VisionTower(path, **options),
        lambda path, **options: VisionTower.load(path, **options),
        lambda path, **options: VisionTower.from_pretrained(path, **options),
        lambda path, **options: CLIPVisionTower(path, ARGS, **options),
        lambda path, **options: CLIPVisionTower.load(path, **options),
        lambda path, **options: build_vision_tower(ARGS, bundle=path, **options),
    ],
)
def test_keyword_that_no_tower_accepts_is_named(clip_bundle: Path, make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'torch_dtype'"):
        make(clip_bundle, torch_dtype="float16")


def test_layer_of_llavas_class_comes_only_from_its_config(clip_bundle: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'select_layer'"):
        CLIPVisionTower(clip_bundle, ARGS, select_layer=-2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "make", [VisionTower, VisionTower.load, lambda path, **k: CLIPVisionTower(path, ARGS, delay_load=True, **k)]
)
def test_options_are_checked_before_anything_is_loaded(make: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"engine is 'fast'; expected trtower\.EngineOptions"):
        make("nowhere", engine="fast")


@pytest.mark.parametrize("make", [VisionTower, VisionTower.load, CLIPVisionTower.load])
@pytest.mark.parametrize(
    ("bundle", "actual"), [(None, "of type NoneType"), (5, "of type int"), ("~nobody-of-this-name/x", "'~nobody")]
)
def test_bundle_that_is_not_a_path_is_refused_in_one_line(make: Callable[..., Any], bundle: Any, actual: str) -> None:
    with pytest.raises(ConfigError, match=f"bundle is {actual}.*; expected the path of a folder"):
        make(bundle)
