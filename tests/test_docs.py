"""What a page says can be typed, can be typed; what it links to is there."""

import ast
import importlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import transformers
import typer
import yaml
from PIL import Image

import trtower
import trtower_export
from tests import pages
from tests.conftest import Bundles, make_model
from tests.export.heads.test_embeddings import make as make_embedding
from tests.pages import DOCS, PAGES, ROOT, name_of, read
from tests.pictures import fill
from tests.runtime.installation.hugging_face import inputs, make
from trtower import cli
from trtower.parity.bounds import BOUNDS
from trtower_export.families import FAMILIES
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.recipes import all_recipes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

API = ROOT / "docs" / "api.md"
KILOBYTE = 1000
LARGEST_IMAGE = 300 * KILOBYTE

NOT_RUN = {
    "CONTRIBUTING.md": "parts of files; test_new_family.py and test_toy_backend.py add whole ones",
    "docs/llava.md": "LLaVA's own code, which `make clients` runs",
    "docs/llm-servers.md": "servers of language models; tests/serving runs what of them runs without a GPU",
    "docs/ray.md": "a client and a cluster, as in tests/serving",
    "docs/robots.md": "LeRobot's own code, which `make test-lerobot` runs",
    "docs/triton.md": "a client of a running server, as in tests/serving",
    "docs/vila.md": "VILA's own code, which `make clients` runs",
}
"""Pages whose Python blocks are compiled and not run, and why."""

by_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def every(find: Callable[[str], list[Any]]) -> pytest.MarkDecorator:
    """Parametrise a test by everything that ``find`` finds on any page."""
    found = [(page, item) for page in PAGES for item in find(read(page))]
    return pytest.mark.parametrize(("page", "item"), found, ids=[f"{name_of(page)}: {item}" for page, item in found])


def find_command(name: str) -> click.Command:
    group: Any = typer.main.get_command(cli._app())
    command: click.Command = group.commands[name]
    return command


def options_of(command: click.Command) -> set[str]:
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts) if name.startswith("-")}


# Commands


@every(lambda text: [shlex.join(call) for call in pages.commands("trtower", text)])
def test_command_is_understood(page: Path, item: str) -> None:
    name, *arguments = shlex.split(item)
    assert find_command(name).make_context(name, arguments)


@every(lambda text: [span for span in pages.spans(text) if re.match(r"trtower [a-z]", span)])
def test_command_in_a_sentence_exists(page: Path, item: str) -> None:
    command = find_command(item.split()[1])
    assert set(re.findall(r"(?<=\s)--[a-z][\w-]*", item)) <= options_of(command) | {"--help"}


@every(lambda text: [call[0] for call in pages.commands("make", text)] + re.findall(r"`make ([a-z][a-z0-9-]*)", text))
def test_make_target_exists(page: Path, item: str) -> None:
    assert re.search(rf"^{item}:", read(ROOT / "Makefile"), flags=re.MULTILINE)


@every(lambda text: re.findall(r"(?:trtower|'\.)\[([a-z][a-z,-]*)\]", text))
def test_extra_exists(page: Path, item: str) -> None:
    declared = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert set(item.split(",")) <= declared.keys()


@pytest.mark.parametrize(
    ("command", "page"),
    [
        ("export", "export"),
        ("build", "export"),
        ("check", "certificate"),
        ("doctor", "precision"),
        ("embed", "embed"),
        ("triton", "triton"),
        ("tune", "serving"),
        ("play", "play"),
    ],
)
def test_page_names_the_options_of_its_command(command: str, page: str) -> None:
    shared = {"--help", *options_of(find_command("export"))} if command in ("check", "doctor") else {"--help"}
    text = read(ROOT / "docs" / f"{page}.md")
    for option in find_command(command).params:
        names = [name for name in (*option.opts, *option.secondary_opts) if name.startswith("--")]
        if names and not shared.intersection(names):
            assert any(re.search(rf"{name}(?![\w-])", text) for name in names), names


# Python


def parse(code: str) -> ast.Module:
    """Parse an example, which may leave things out with … and may be a row of a dict."""
    code = code.replace("…", "...")
    try:
        return ast.parse(code)
    except SyntaxError:
        return ast.parse(f"{{{code}}}")


def public_names(name: str) -> set[str]:
    """Return the names that one may import from a module, also if it needs an extra that is not installed here."""
    try:
        module = importlib.import_module(name)
    except trtower.MissingExtraError:
        source = read(ROOT / "runtime" / f"{name.replace('.', '/')}.py")
        return {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return set(getattr(module, "__all__", None) or dir(module))


@every(lambda text: pages.blocks("python", text))
def test_python_compiles_and_imports_what_exists(page: Path, item: str) -> None:
    for node in ast.walk(parse(item)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trtower"):
            assert {alias.name for alias in node.names} <= public_names(str(node.module))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("trtower") or importlib.import_module(alias.name)


@every(lambda text: re.findall(r"(?<![\w/.])trtower\.([A-Za-z]\w*)(?=\()", text))
def test_function_of_trtower_exists(page: Path, item: str) -> None:
    assert item in trtower.__all__


@by_page
def test_every_python_block_is_run_or_has_a_reason(page: Path) -> None:
    if pages.blocks("python", read(page)):
        assert (name_of(page) in NOT_RUN) != (name_of(page) in RUN)


def run(code: str, **names: Any) -> dict[str, Any]:
    """Run an example of a page as it is written."""
    exec(code, names)  # noqa: S102 - the page's own example
    return names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def certify(bundle: Path, checkpoint: Path, *options: str) -> None:
    photographs = Path("photographs")
    photographs.mkdir(exist_ok=True)
    Image.effect_noise((60, 50), 80).convert("RGB").save(photographs / "noise.png")
    arguments = [bundle, "--images", photographs, "--checkpoint", checkpoint, *options]
    assert find_command("check").main([*map(str, arguments)], standalone_mode=False) == 0


@pytest.mark.parametrize("page", ["index.md", "deploy.md", "serving.md", "loaded-models.md"])
def test_page_runs_from_top_to_bottom(
    bundles: Bundles, clip_bundle: Path, checkpoints: dict[str, Path], here: Path, page: str
) -> None:
    examples = pages.blocks("python", read(ROOT / "docs" / page))
    names: dict[str, Any] = {"image": Image.new("RGB", (60, 50))}
    for bundle in set(re.findall(r"engines/[\w.-]+", "".join(examples))):
        if "llava" in bundle:
            shutil.copytree(bundles(), bundle)
            names["model"] = make("llava")
            names["inputs"] = inputs(names["model"], "llava", "one image")
        else:
            shutil.copytree(clip_bundle, bundle)
            certify(Path(bundle), checkpoints["clip"], "--backend", "openvino")
    for code in examples:
        names = run(code, **names)


def test_export_from_python_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export, check, build = pages.blocks("python", read(ROOT / "docs" / "export.md"))
    make_model("clip").save_pretrained("openai/clip-vit-large-patch14-336")  # in the place of the hub's
    run(export)
    assert "engines/clip-l-bf16 3 of 4 layers" in capsys.readouterr().out
    (here / "photographs").mkdir()
    Image.effect_noise((60, 50), 80).convert("RGB").save(here / "photographs" / "noise.png")
    assert run(check)["certificate"].passed
    assert "add_plan(" in build  # it wants a TensorRT; tests/export/plan builds with what is installed


def test_certificate_is_demanded(bundles: Bundles, checkpoints: dict[str, Path], here: Path) -> None:
    verify, load = pages.blocks("python", read(ROOT / "docs" / "certificate.md"))
    bundle = Path(shutil.copytree(bundles(), "engines/clip-vit-large-patch14-336"))
    assert run(verify)["tower"].is_loaded
    with pytest.raises(trtower.BundleError, match="not certified"):
        run(load)
    certify(bundle, checkpoints["clip"])
    assert run(load)["tower"].is_loaded


def test_layers_are_picked_at_load(here: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4, image_size=42, patch_size=14
    )
    transformers.CLIPVisionModel(config).save_pretrained("deep")
    options = ExportOptions(select_layer=(-2, -5, -8, -11, 6), flavour="none", check=False)
    export_tower("deep", Path("engines/vip-llava-7b-hf"), options)
    (code,) = pages.blocks("python", read(ROOT / "docs" / "models.md"))
    assert run(code)["tower"].hidden_size == 2 * 64


def test_embedding_is_a_vector_of_length_1(here: Path) -> None:
    make_embedding("clip").save_pretrained("small")
    options = ExportOptions(head="embedding", normalize=True, precision="fp32", flavour="none", check=False)
    export_tower("small", Path("engines/clip-vit-base-patch32.rehearsal-embedding"), options)
    (code,) = pages.blocks("python", read(ROOT / "docs" / "heads.md"))
    vectors = run(code, image=Image.new("RGB", (60, 50)))["vectors"]
    assert vectors.shape == (2, 24)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))


def test_pictures_are_embedded(here: Path) -> None:
    fill(here / "photos", range(5))
    make_embedding("clip").save_pretrained("small")
    options = ExportOptions(head="embedding", normalize=True, precision="fp32", flavour="none", check=False)
    bundle = export_tower("small", Path("engines/clip-vit-base-patch32-embedding"), options)
    trtower.verify_bundle(bundle)
    code, with_pyarrow = pages.blocks("python", read(ROOT / "docs" / "embed.md"))
    names = run(code)
    assert (names["names"][0], names["vectors"].shape) == ("000.png", (5, 24))
    assert (run(with_pyarrow)["vectors"] == names["vectors"].numpy()).all()


def test_example_for_hugging_face_agrees_with_the_eager_tower(bundles: Bundles, here: Path) -> None:
    shutil.copytree(bundles(), "engines/llava-1.5-7b-hf")
    model = make("llava")
    convince, _ = pages.blocks("python", read(ROOT / "docs" / "hugging_face.md"))
    names = run(convince, torch=torch, trtower=trtower, model=model, inputs=inputs(model, "llava", "one image"))
    assert names["error"] < 1e-4
    assert names["agreement"] == 1


RUN = {
    "README.md": "test_readme.py",
    "docs/certificate.md": test_certificate_is_demanded,
    "docs/deploy.md": test_page_runs_from_top_to_bottom,
    "docs/embed.md": test_pictures_are_embedded,
    "docs/export.md": test_export_from_python_runs,
    "docs/heads.md": test_embedding_is_a_vector_of_length_1,
    "docs/hugging_face.md": test_example_for_hugging_face_agrees_with_the_eager_tower,
    "docs/index.md": test_page_runs_from_top_to_bottom,
    "docs/loaded-models.md": test_page_runs_from_top_to_bottom,
    "docs/models.md": test_layers_are_picked_at_load,
    "docs/serving.md": test_page_runs_from_top_to_bottom,
}
"""What runs the Python blocks of a page. Those with gaps (…) and the one that builds a plan are only compiled."""


# Links


@every(pages.links)
def test_link_leads_somewhere(page: Path, item: str) -> None:
    target, _, anchor = item.partition("#")
    path = page.parent / target if target else page
    assert path.exists()
    if anchor:
        assert path.suffix == ".md"
        assert anchor in pages.anchors(read(path))


@every(lambda text: re.findall(r"`((?:export|runtime|tests|benchmarks|examples|docs)/[\w/.-]+)`", text))
def test_file_that_is_named_exists(page: Path, item: str) -> None:
    assert (ROOT / item).exists()


@by_page
def test_no_word_of_the_machine_it_was_written_on(page: Path) -> None:
    assert os.fspath(Path.home()) not in read(page)


@pytest.mark.parametrize("image", sorted((ROOT / "docs" / "images").iterdir()), ids=lambda image: image.name)
def test_image_loads_quickly(image: Path) -> None:
    assert image.stat().st_size < LARGEST_IMAGE


# The site


class Loader(yaml.SafeLoader):  # type: ignore[misc] # yaml has no annotations
    """Reads mkdocs.yml without calling what its tags name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for each in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(each)]


def test_site_has_every_page_once() -> None:
    site = yaml.load(read(ROOT / "mkdocs.yml"), Loader)  # noqa: S506 - a SafeLoader
    assert sorted(pages_of(site["nav"])) == [page.name for page in DOCS]


SERVING = (
    "triton.repository.write_repository triton.config.TritonOptions ray.deployment.bind_tower ray.options.RayOptions "
    "ray.replica.TowerReplica vllm.image_embeds vllm.content_parts dynamo.TowerBackend metrics.BatchMetrics "
    "tracing.BatchSpans"
)
"""What the pages on servers tell readers to import."""


def test_reference_has_every_public_name_once() -> None:
    documented = re.findall(r"^::: (\S+)$", read(API), flags=re.MULTILINE)
    names = [f"trtower.{name}" for name in trtower.__all__ if name != "__version__"]
    names += [f"trtower_export.{name}" for name in trtower_export.__all__]
    extension_points = ["trtower.runners.base.Backend", "trtower.runners.base.Runner"]
    extension_points += ["trtower_export.families.base.Family"]
    names += [f"trtower.serving.{name}" for name in SERVING.split()]
    assert sorted(documented) == sorted(names + extension_points)


def test_site_links_to_the_repository_for_what_it_does_not_have() -> None:
    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = SimpleNamespace(file=SimpleNamespace(src_path="export.md"))
    config = SimpleNamespace(docs_dir=str(ROOT / "docs"), extra={"repository": "https://example.org/r"})
    text = "[a](../CONTRIBUTING.md#to-add-a-family) [b](../examples) [c](models.md)"
    assert hooks.on_page_markdown(text, page=page, config=config) == (
        "[a](https://example.org/r/blob/main/CONTRIBUTING.md#to-add-a-family) [b](https://example.org/r/tree/main/examples)"
        " [c](models.md)"
    )
    with pytest.raises(FileNotFoundError, match=r"\.\./absent\.md, which does not exist"):
        hooks.on_page_markdown("[d](../absent.md)", page=page, config=config)


# Tables that repeat what the code says


def section(page: str, title: str) -> str:
    return read(ROOT / "docs" / page).partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_bounds_are_those_of_the_check() -> None:
    rows = [
        line.split("|")[1:-1] for line in section("certificate.md", "Bounds").splitlines() if line.startswith("| `")
    ]
    assert len(rows) == 5
    for figure, _, *limits in rows:
        name = figure.strip(" `")
        for limit, precisions in zip(limits, (["fp16"], ["bf16"], ["fp32"], ["fp8", "int8"]), strict=True):
            for precision in precisions:
                demanded = 0.0 if name == "non_finite" else getattr(BOUNDS[precision], name)
                assert limit.strip() == "not bounded" if demanded is None else float(limit) == demanded


def test_recipe_for_every_name_that_is_listed() -> None:
    lines = [line for line in section("models.md", "Recipes").splitlines() if line.startswith("- ")]
    assert {name for line in lines for name in re.findall(r"`(\S+)`", line)} == {each.name for each in all_recipes()}


def test_row_for_every_family() -> None:
    table = section("models.md", "Families")
    for family in FAMILIES:
        assert f"`{family.name}`" in table
        assert f"`{family.model_class}`" in table
