"""tower.json describes the full tower and the cut one, and is refused if it contradicts itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import IMAGE_SIZE, MODELS, make_model
from tests.export.made_up import manifest
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import MANIFEST, SCHEMA, Manifest, TowerCost
from trtower.errors import BundleError
from trtower.layer_codes import LAST
from trtower_export.families import family_of

FULL = TowerCost(layers=24, parameters=303_507_456, flop=381_918_216_192)
CUT = TowerCost(layers=23, parameters=290_909_184, flop=366_033_858_560)


def edit(bundle: Path, **changes: Any) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    data = {key: value for key, value in {**data, **changes}.items() if value is not ...}
    (bundle / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("precision", "megabytes"),
    [
        ("fp16", " (582 of 607 MB)"),
        ("bf16", " (582 of 607 MB)"),
        ("fp32", " (1164 of 1214 MB)"),
        ("int8", ""),  # leaves some layers in FP16
    ],
)
def test_cut_is_described_in_one_line(precision: str, megabytes: str) -> None:
    assert CUT.describe_cut(FULL, precision) == (
        f"23 of 24 layers, 290.9 of 303.5 M parameters{megabytes}, 366.0 of 381.9 GFLOP an image"
    )


def test_older_schema_needs_another_export(spoilt: Path) -> None:
    edit(spoilt, schema=SCHEMA - 1, full=..., cut=...)
    with pytest.raises(BundleError) as failure:
        Bundle.open(spoilt)
    assert str(failure.value) == (
        f"{spoilt}: tower.json has schema {SCHEMA - 1}, from an older trtower; this one reads {SCHEMA}. "
        "Export the bundle again, with --overwrite."
    )


@pytest.mark.parametrize("key", ["full", "cut"])
def test_manifest_without_its_figures_is_refused(spoilt: Path, key: str) -> None:
    edit(spoilt, **{key: ...})
    with pytest.raises(BundleError, match=f"missing {key}; unknown none"):
        Bundle.open(spoilt)


@pytest.mark.parametrize("key", ["layers", "parameters", "flop"])
def test_figures_are_integers_and_never_null(spoilt: Path, key: str) -> None:
    cut = json.loads((spoilt / MANIFEST).read_text())["cut"]
    for wrong in (None, float(cut[key]), str(cut[key]), True):
        edit(spoilt, cut={**cut, key: wrong})
        with pytest.raises(BundleError, match=rf"tower\.json\.cut\.{key} is .*; expected int"):
            Bundle.open(spoilt)


@pytest.mark.parametrize(("key", "counted"), [("full", "3 of 9"), ("cut", "9 of 4")])
def test_layers_that_the_spec_does_not_read_are_refused(spoilt: Path, key: str, counted: str) -> None:
    cost = json.loads((spoilt / MANIFEST).read_text())[key]
    edit(spoilt, **{key: {**cost, "layers": 9}})
    with pytest.raises(BundleError, match=f"contradicts itself: cut has {counted} layers; the spec reads 3 of 4"):
        Bundle.open(spoilt)


def test_source_without_a_float32_hash_is_refused(spoilt: Path) -> None:
    edit(spoilt, source=json.loads((spoilt / MANIFEST).read_text())["source"] | {"weights_sha256": {}})
    with pytest.raises(BundleError, match="contradicts itself: weights_sha256 has no float32"):
        Bundle.open(spoilt)


@pytest.mark.parametrize("name", MODELS)
def test_manifest_without_naming_keeps_its_meaning(name: str) -> None:
    config = make_model(name).config
    written = manifest(family_of(config.model_type).spec(config, LAST, "patch", IMAGE_SIZE))
    data = json.loads(written.to_json())
    assert Manifest.from_json(json.dumps(data)) == written
    del data["spec"]["naming"]
    assert Manifest.from_json(json.dumps(data)) == written
