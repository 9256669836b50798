"""The page in a real browser: drop a picture, see its patches, click one."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CHOSEN_ON_A_CPU, Bundles
from tests.pictures import encoded
from tests.serving.triton_server import free_port

pytest.importorskip("gradio", reason="gradio has an environment of its own: make test-play")
api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run")
WITHIN_MS = 60_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def command(bundle: Path, *options: object) -> list[str]:
    trtower = Path(sys.executable).parent / "trtower"
    return [str(trtower), "play", str(bundle), "--backend", CHOSEN_ON_A_CPU, *map(str, options)]


@pytest.fixture(scope="module")
def url(bundles: Bundles) -> Iterator[str]:
    port = free_port()
    with subprocess.Popen(command(bundles(), "--port", port), stdout=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urlopen(url).close()
                break
            except (URLError, ConnectionError):
                assert process.poll() is None
                time.sleep(0.5)
        yield url
        process.terminate()


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    """Open the page; it may ask for nothing elsewhere, and print no error."""
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1500, "height": 1600})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url, wait_until="domcontentloaded")
        page.get_by_text("Drop a picture", exact=True).first.wait_for(timeout=WITHIN_MS)
        yield page
        browser.close()
    assert {each.split("/")[2] for each in asked if each.startswith("http")} == {url.removeprefix("http://")}


def shown(page: Any, label: str) -> Any:
    """Return the picture under a label."""
    return page.locator(".block", has=page.get_by_text(label, exact=True)).locator("img").first


def pixels_of(page: Any, label: str, folder: Path) -> Any:
    picture = shown(page, label)
    picture.wait_for(timeout=WITHIN_MS)
    content = page.request.get(picture.get_attribute("src")).body()
    file = folder / "shown.png"
    file.write_bytes(content)
    return np.asarray(Image.open(file).convert("RGB"))


def test_picture_is_seen_and_its_patches_compared(page: Any, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(encoded(0))
    page.locator("input[type=file]").first.set_input_files(photo)
    page.get_by_text("Cosine of a patch between the two").wait_for(timeout=WITHIN_MS)
    reference, bundle = (pixels_of(page, label, tmp_path) for label in ("PyTorch", "Bundle"))
    assert reference.shape == bundle.shape
    assert np.abs(reference.astype(int) - bundle).max() <= 1
    assert len(np.unique(reference.reshape(-1, 3), axis=0)) == 9  # a colour for each patch

    box = shown(page, "PyTorch").bounding_box()
    shown(page, "PyTorch").click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.5})
    page.get_by_text("Patch in row 2, column 3").wait_for(timeout=WITHIN_MS)
    similar = pixels_of(page, "Similarity, bundle", tmp_path)
    side = len(similar)
    assert tuple(similar[side // 2, side - 1]) == (255, 45, 149)  # the frame of the patch that was clicked

    shown(page, "What the tower sees").click(position={"x": 5, "y": 5})
    page.get_by_text("Patch in row 1, column 1").wait_for(timeout=WITHIN_MS)


def test_port_that_is_taken_is_said(url: str, bundles: Bundles) -> None:
    port = url.rpartition(":")[2]
    done = subprocess.run(command(bundles(), "--port", port), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"cannot serve the page at 127.0.0.1:{port}" in done.stderr
