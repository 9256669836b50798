"""The doctor's figures match what hooks measure, and each error is one line."""

import copy
import json
import math
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import IMAGE_SIZE, make_model
from tests.export.small_towers import cut, operations, pixels, simulation
from trtower.cli import run
from trtower.errors import CheckpointError
from trtower.spec import TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.photographs import load_photographs, prepare
from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trtower_export.checkpoint.preprocessor import fit_preprocessor
from trtower_export.console import LoggedProgress
from trtower_export.graph.truncate import truncate
from trtower_export.precision.doctor import Extremes, OperationFigures, examine, named_weights, simulate

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 65504.0
HOT = "layers.1.mlp.fc1"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Return a folder of two small images, which load faster than photographs."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, extent in enumerate([(-2, -1.5, 1, 1.5), (-1, -1, 0, 0)]):
        Image.effect_mandelbrot((60, 60), extent, 60).convert("RGB").save(folder / f"{index}.png")
    return folder


@cache
def drawn(count: int) -> tuple[Tensor, ...]:
    """Return random images, each (1, 3, S, S)."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for _ in range(count))


def heat(model: nn.Module) -> None:
    """Make one unit of an MLP overflow."""
    getattr(model, "vision_model", model).encoder.layers[1].mlp.fc1.bias[3] = -7e4


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a CLIP in which one unit of the second MLP is at -70000, where GELU is 0."""
    model = make_model("clip-gelu")
    with torch.no_grad():
        heat(model)
    folder = tmp_path_factory.mktemp("hot")
    model.save_pretrained(folder)
    return folder


def named(images: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(place): pixel_values for place, pixel_values in enumerate(images)}


def opened(folder: Path) -> tuple[Checkpoint, TowerSpec]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, checkpoint.spec()


def diagnose(folder: Path, images: Sequence[Tensor], **options: Any) -> dict[str, OperationFigures]:
    found = examine(*opened(folder), named(images), LoggedProgress(), **options)
    return {operation.name: operation for operation in found.operations}


def hooked(tower: nn.Module, images: Sequence[Tensor]) -> dict[str, float]:
    """Return the largest magnitude of every module's result."""
    largest: dict[str, float] = {}

    def look(name: str, result: object) -> None:
        result = result[0] if isinstance(result, tuple) else result  # in transformers 4.57 a layer returns a tuple
        if isinstance(result, Tensor):
            largest[name] = max(largest.get(name, 0.0), float(result.abs().max()))

    hooks = [
        module.register_forward_hook(lambda _, __, result, name=name: look(name, result))
        for name, module in tower.named_modules()
    ]
    with torch.no_grad():
        for pixel_values in images:
            tower(pixel_values)
    for hook in hooks:
        hook.remove()
    return largest


@pytest.mark.parametrize("family", ["clip", "dinov2"])
def test_largest_is_the_largest_magnitude_in_a_hook_over_all_images(checkpoints: dict[str, Path], family: str) -> None:
    checkpoint, spec = opened(checkpoints[family])
    tower = truncate(checkpoint.load_model(spec), checkpoint.family, spec)
    expected, figures = hooked(tower, drawn(3)), diagnose(checkpoints[family], drawn(3))
    compared = 0
    for name, operation in figures.items():
        module = dict(tower.named_modules()).get(name)
        if module is None or name.endswith("activation_fn") or getattr(module, "bias", None) is not None:
            continue  # the doctor also looks at intermediate values
        assert operation.largest == pytest.approx(expected[name], rel=1e-5)
        compared += 1
    for layer in range(spec.depth):  # a layer's result is its last sum
        assert figures[f"layers.{layer}.residual2"].largest == pytest.approx(expected[f"layers.{layer}"], rel=1e-5)
    assert compared >= 2
    assert hooked(tower, drawn(1)) != expected


def test_largest_of_a_linear_layer_includes_its_product_before_the_bias(hot: Path) -> None:
    checkpoint, spec = opened(hot)
    tower = truncate(checkpoint.load_model(spec), checkpoint.family, spec)
    layer = tower.layers[1]
    with torch.no_grad():
        layer.mlp.fc1.bias[3] = -3.0  # no longer hot
        layer.mlp.fc1.weight[4] = 0.0
        layer.mlp.fc1.weight[4, 0] = 1000.0
        layer.layer_norm2.weight[0], layer.layer_norm2.bias[0] = 0.0, 1.0
        layer.mlp.fc1.bias[4] = -999.0  # almost as large as the product, so that the sum is small
    extremes = Extremes()
    simulate(tower, spec).run(drawn(1)[0], observe=extremes.observe)
    assert hooked(tower, drawn(1))[HOT] < 100
    assert extremes.largest[HOT] == pytest.approx(1000.0)


def test_largest_of_a_layer_norm_is_that_of_its_sums_and_squares(checkpoints: dict[str, Path]) -> None:
    checkpoint, spec = opened(checkpoints["clip"])
    tower = truncate(checkpoint.load_model(spec), checkpoint.family, spec)
    largest: list[float] = []
    norm = tower.layers[1].layer_norm1

    def look(_: nn.Module, args: tuple[Tensor], result: Tensor) -> None:
        (x,) = args
        squares = (x - x.mean(-1, keepdim=True)).square().sum(-1)
        largest.extend(float(numbers.abs().max()) for numbers in (x.sum(-1), squares, result))

    hook = norm.register_forward_hook(look)
    with torch.no_grad():
        tower(drawn(1)[0])
    hook.remove()
    found = diagnose(checkpoints["clip"], drawn(1))["layers.1.layer_norm1"]
    assert found.largest == pytest.approx(max(largest), rel=1e-5)
    assert found.largest > 2 * largest[-1]


def test_every_operation_of_every_layer_is_reported_in_the_order_in_which_they_run(
    checkpoints: dict[str, Path],
) -> None:
    found = examine(*opened(checkpoints["dinov2"]), named(drawn(1)), LoggedProgress())
    names = [name for name in operations("dinov2").names if not name.startswith(("layers.3", "final_norm"))]
    assert [operation.name for operation in found.operations] == names  # state -2 is read
    for operation in found.operations:
        assert operation.error.keys() == {"fp16", "bf16"}
        assert 0 < operation.error["fp16"] < operation.error["bf16"]
        assert operation.headroom == LIMIT / operation.largest
        assert operation.overflow == 0
        assert 0 <= operation.subnormal <= 1
        assert operation.name.endswith(operation.part)


def test_error_is_the_relative_error_at_the_output_on_the_worst_image(
    checkpoints: dict[str, Path],
) -> None:
    checkpoint, spec = opened(checkpoints["clip"])
    tower = truncate(checkpoint.load_model(spec), checkpoint.family, spec)
    simulated = simulate(tower, spec)
    (operation,) = (each for each in simulated.operations if each.name == HOT)
    errors = []
    with torch.no_grad():
        for pixel_values in drawn(3):
            kept: dict[torch.fx.Node, Tensor] = {}
            reference = simulated.run(pixel_values, keep=kept)
            found = simulated.rerun(kept, operation, torch.float16)
            errors.append(float((found - reference).norm() / reference.norm()))
    low, high, worst = sorted(range(3), key=errors.__getitem__)
    images = [drawn(3)[index] for index in (low, worst, high)]
    three = diagnose(checkpoints["clip"], images, error_images=3)[HOT]
    assert three.error["fp16"] == pytest.approx(errors[worst], rel=1e-6)
    assert errors[low] < 0.999 * errors[worst]
    assert errors[high] < 0.999 * errors[worst]


@pytest.mark.parametrize("hardest", [0, 1, 2])
@pytest.mark.parametrize("error_images", [1, 3])
def test_error_is_measured_on_the_hardest_image_first_and_stays_not_finite(
    tmp_path: Path, hardest: int, error_images: int
) -> None:
    """The patch embedding overflows on one image, and the norm after it brings the values back into range."""
    model = make_model("clip")
    with torch.no_grad():
        getattr(model, "vision_model", model).embeddings.patch_embedding.weight.mul_(2.0**7)
    model.save_pretrained(tmp_path)
    images = [pixel_values * (500 if place == hardest else 1) for place, pixel_values in enumerate(drawn(3))]
    found = examine(*opened(tmp_path), named(images), LoggedProgress(), error_images=error_images)
    assert found.error_images[0] == str(hardest)
    assert len(found.error_images) == error_images
    (embedding,) = (each for each in found.operations if each.name == "stem.0.patch_embedding")
    assert embedding.overflow
    assert embedding.error["fp16"] is None


def test_the_overflowing_operation_is_the_only_one_named_and_has_no_error_in_fp16(hot: Path) -> None:
    found = diagnose(hot, drawn(2))
    assert [name for name, each in found.items() if each.overflow] == [HOT]
    assert [name for name, each in found.items() if each.error["fp16"] is None] == [HOT]
    assert all(each.error["bf16"] is not None for each in found.values())
    tokens = 2 * cut("clip")[1].num_tokens
    # One unit's sum for every token, and its bias once.
    assert found[HOT].overflow == tokens + 1
    assert found[HOT].largest == pytest.approx(7e4, rel=1e-2)
    assert found[HOT].headroom == pytest.approx(LIMIT / 7e4, rel=1e-2)


def test_intermediate_values_of_an_operation_count_too() -> None:
    """QuickGELU multiplies by 1.702 before its sigmoid, so it can overflow although its input does not."""
    tower, spec = cut("clip")
    hot_tower = copy.deepcopy(tower)
    with torch.no_grad():
        hot_tower.layers[1].mlp.fc1.bias[3] = -5e4
    simulated, extremes = simulate(hot_tower, spec), Extremes()
    simulated.run(pixels(), observe=extremes.observe)
    assert extremes.overflowing(simulated.operations) == ["layers.1.mlp.activation_fn"]
    assert extremes.largest["layers.1.mlp.activation_fn"] == pytest.approx(1.702 * 5e4, rel=1e-2)


def test_norm_whose_squares_overflow_is_named() -> None:
    tower, spec = cut("clip")
    hot_tower = copy.deepcopy(tower)
    with torch.no_grad():
        hot_tower.layers[1].mlp.fc2.bias[5] = 1e3  # the squares in the norm overflow, which only makes its result 0
    simulated, extremes = simulate(hot_tower, spec), Extremes()
    simulated.run(pixels(), observe=extremes.observe)
    names = [f"layers.{layer}.layer_norm{which}" for layer in (2, 3) for which in (1, 2)]
    assert extremes.overflowing(simulated.operations) == names


def test_extremes_count_what_lies_beyond_the_limit_and_below_the_smallest_normal() -> None:
    operation = operations("clip")[0]
    extremes = Extremes()
    smallest = 2.0**-14
    numbers = torch.tensor([65504.0, 65505.0, -7e4, 0.0, smallest, smallest / 2, -smallest / 2, 1e-30])
    extremes.observe(operation, numbers, result=True)
    extremes.observe(operation, torch.tensor([1e6, 1e-9]), result=False)  # intermediate values do not count as results
    extremes.observe(operation, torch.tensor([-3.0, 0.0]), result=True)
    assert extremes.largest == {operation.name: 1e6}
    assert extremes.overflow == {operation.name: 3}
    assert extremes.nonzero == {operation.name: 8}
    assert extremes.small == {operation.name: 3}
    assert extremes.overflowing(operations("clip")) == [operation.name]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_refused_with_the_first_operation_that_computes_it(value: float) -> None:
    operation = operations("clip")[4]
    with pytest.raises(CheckpointError, match=rf"not finite even in FP32: {operation.name} is the first .*\(2 val"):
        Extremes().observe(operation, torch.tensor([1.0, value, value]), result=False)


def test_weights_beyond_the_limit_count_for_the_operation_that_reads_them() -> None:
    found, weights = operations("dinov2"), named_weights(cut("dinov2")[0])
    name = "layers.2.layer_scale1.lambda1"
    extremes = Extremes()
    extremes.observe_weights(found, {**weights, name: torch.tensor([1.0, -1e5, 7e4])})
    assert extremes.overflow == {"layers.2.layer_scale1": 2}
    assert extremes.largest == {}


def test_tower_with_broken_weights_is_refused_with_the_first_operation() -> None:
    tower, spec = cut("clip")
    broken = copy.deepcopy(tower)
    with torch.no_grad():
        broken.layers[2].self_attn.k_proj.weight[1, 1] = math.nan
    extremes = Extremes()
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.k_proj is the first"):
        simulate(broken, spec).run(pixels(), observe=extremes.observe)
    assert set(extremes.largest) == set(simulation("clip").operations.names[: len(extremes.largest)])


def test_examining_leaves_the_images_as_they_were(checkpoints: dict[str, Path]) -> None:
    before = [image.clone() for image in drawn(2)]
    examine(*opened(checkpoints["clip"]), named(drawn(2)), LoggedProgress())
    assert all(map(torch.equal, before, drawn(2)))


def doctor(*arguments: object) -> int:
    return run(["doctor", *map(str, arguments)])


def strict(text: str) -> dict[str, Any]:
    """Parse JSON, and refuse NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def test_json_is_valid_and_complete(hot: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(hot, "--images", photographs, "--json") == 0
    found = strict(capsys.readouterr().out)
    assert found["images"] == ["0.png", "1.png"]
    assert found["overflowing"] == [HOT]
    assert found["error_images"] in (["0.png"], ["1.png"])
    assert found["skipped"] == []
    assert (found["checkpoint"], found["image_size"], found["layers"]) == (str(hot), IMAGE_SIZE, [3])
    checkpoint, spec = opened(hot)
    processor = ImageProcessor(fit_preprocessor(checkpoint, spec.image_size, LoggedProgress()))
    expected = diagnose(hot, prepare(load_photographs(photographs).images, processor))
    assert [row["name"] for row in found["operations"]] == list(expected)
    for row in found["operations"]:
        operation = expected[row["name"]]
        assert row == vars(operation)
    (broken,) = (row for row in found["operations"] if row["overflow"])
    assert broken["name"] == HOT
    assert broken["error"]["fp16"] is None


def test_json_is_valid_where_an_operation_computes_nothing_but_zeros(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("dinov2")
    with torch.no_grad():
        model.encoder.layer[1].layer_scale1.lambda1.zero_()
    model.save_pretrained(tmp_path / "idle")
    assert doctor(tmp_path / "idle", "--images", photographs, "--json") == 0
    (row,) = (row for row in strict(capsys.readouterr().out)["operations"] if row["name"] == "layers.1.layer_scale1")
    assert row["largest"] == 0
    assert row["headroom"] is None
    assert row["subnormal"] == 0


def test_table_has_a_row_for_each_part_and_names_what_overflows(
    hot: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(hot, "--images", photographs) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("layers.*", "stem"))}
    parts = [operation.part for operation in operations("clip") if operation.layer == 0]
    assert [name for name in rows if name.startswith("layers")] == [f"layers.*.{part}" for part in parts]
    assert "@1" in rows["layers.*.mlp.fc1"]
    assert "not finite" in rows["layers.*.mlp.fc1"]
    assert f"beyond FP16's 65504: {HOT}\n" in out
    assert f"largest errors in FP16: {HOT} (not finite), " in out
    assert "largest: magnitude of any value on 2 images" in out
    assert re.search(r"on [01]\.png$", out, re.MULTILINE)


def test_table_of_every_operation_lists_each(
    checkpoints: dict[str, Path], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(checkpoints["dinov2"], "--images", photographs, "--every") == 0
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out.splitlines() if line.startswith(("layers.", "stem."))]
    assert listed == [name for name in operations("dinov2").names if not name.startswith(("layers.3", "final_norm"))]
    assert "nothing is beyond FP16's 65504; the closest is " in out


def test_without_error_images_no_error_is_measured_or_shown(
    hot: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = ("--picture", tmp_path / "p.png")
    assert doctor(hot, "--images", photographs, "--error-images", "0", *picture) == 0
    said = capsys.readouterr()
    assert "one by one" not in said.err
    assert "error" not in said.out
    assert f"beyond FP16's 65504: {HOT}\n" in said.out
    assert doctor(hot, "--images", photographs, "--error-images", "0", "--json") == 0
    assert all(row["error"] == {} for row in strict(capsys.readouterr().out)["operations"])


def test_picture_is_a_png(hot: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert doctor(hot, "--images", photographs, "--picture", tmp_path / "p.png") == 0
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    assert str(tmp_path / "p.png") in capsys.readouterr().err


def test_picture_that_cannot_be_written_is_refused_before_the_examination(
    hot: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path / "nowhere" / "p.png", tmp_path, tmp_path / "p.svg"):
        assert doctor(hot, "--images", photographs, "--picture", place) == 2
        assert "Run in FP32" not in (said := capsys.readouterr().err)
        assert f"error: --picture {place} cannot be written" in said.splitlines()[-1]


def test_picture_without_matplotlib_is_refused_before_the_examination(
    hot: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert doctor(hot, "--images", photographs, "--picture", tmp_path / "p.png") == 1
    assert "Run in FP32" not in (said := capsys.readouterr().err)
    assert re.match(r"error: --picture needs .*matplotlib.*report", said.splitlines()[-1])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.err.splitlines()[-1:] == errors
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return errors[0]


def test_folder_without_images_is_refused(hot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert doctor(hot, "--images", tmp_path) == 1
    assert "has no image files" in one_error(capsys)


def test_images_that_are_all_unreadable_are_refused_by_name(
    hot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    assert doctor(hot, "--images", tmp_path) == 1
    assert "has no readable image: found a.png, b.jpg" in one_error(capsys)


def test_image_that_is_unreadable_is_skipped_named_and_counted(
    hot: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("broken.png", "empty.webp"):
        (photographs / name).write_bytes(b"")
    assert doctor(hot, "--images", photographs, "--json") == 0
    captured = capsys.readouterr()
    assert strict(captured.out)["images"] == ["0.png", "1.png"]
    assert "skipped 2 as unreadable: broken.png, empty.webp" in captured.err


def test_tower_with_broken_weights_is_refused_in_one_line(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("dinov2")
    with torch.no_grad():
        model.encoder.layer[2].mlp.fc2.weight[3, 3] = math.nan
    model.save_pretrained(tmp_path / "broken")
    assert doctor(tmp_path / "broken", "--images", photographs) == 1
    error = one_error(capsys)
    assert "not finite even in FP32: layers.2.mlp.fc2 is the first" in error


def test_unknown_operation_to_keep_is_refused_with_the_nearest(
    hot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    arguments = ["export", str(hot), "--out", str(out), "--flavour", "none", "--no-check"]
    for pattern, nearest in (("layers.9.nothing", "layers."), ("layers.0.mlp.fc9", "layers.0.mlp.fc1")):
        assert run([*arguments, "--keep-fp32", f"layers.0.mlp, {pattern}"]) == 2
        error = one_error(capsys)
        assert f"'{pattern}' is not an operation of this tower; the nearest are " in error
        assert nearest in error.partition("nearest are")[2]
        assert not out.exists()


def test_layer_outside_the_tower_is_refused(hot: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(hot, "--images", photographs, "--select-layer=-9") == 2
    assert "select_layer=-9 is outside this tower" in one_error(capsys)
