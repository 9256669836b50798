"""Without a cluster: what a user types first, and what an address that does not answer costs."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import fill
from trtower import BackendError, ConfigError, EmbedOptions, embed_pictures
from trtower.embedding.on_ray import Share, divide

pytest.importorskip("ray", reason="Ray has an environment of its own: make test-serving")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's code warns of itself, in many places


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    fill(tmp_path / "photos", range(40))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no answer from Ray at 127.0.0.1:1 .*Connection refused"),
        ("nowhere.invalid:6379", "no answer from Ray at nowhere.invalid:6379"),
        ("ray://127.0.0.1:10001", "expected local, auto, or HOST:PORT"),
        ("cluster", "expected local, auto, or HOST:PORT"),
        ("auto", "cannot connect to Ray at auto: Could not find any running Ray instance"),
    ],
)
def test_address_that_does_not_answer_is_said_within_seconds(
    certified: Path, photos: Path, tmp_path: Path, address: str, message: str
) -> None:
    with pytest.raises((BackendError, ConfigError), match=message):
        embed_pictures(photos, certified, tmp_path / "out", EmbedOptions(ray=address))


def test_address_of_another_server_is_said_within_seconds(certified: Path, photos: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(BackendError, match=f"what answers at {address} is not Ray, or not healthy"):
            embed_pictures(photos, certified, tmp_path / "out", EmbedOptions(ray=address))


def test_command_runs_on_this_machine(certified: Path, photos: Path, tmp_path: Path) -> None:
    command: list[Any] = [
        Path(sys.executable).parent / "trtower",
        "embed",
        photos,
        "--bundle",
        certified,
        "--ray",
        "local",
    ]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--out", out, "--cores", "1", "--per-file", "4"], capture_output=True, text=True, check=True
    )
    assert f"{out}: 40 pictures, float32 (9 x 64), 11 files" in done.stdout
    assert "left out: bad.png: Pillow finds no picture in it" in done.stdout
    assert "41 of 41" in done.stderr


@pytest.mark.parametrize(
    ("nodes", "options", "share"),
    [
        ([{"CPU": 2}], {}, Share(workers=1, cores=2, gpus=0)),
        ([{"CPU": 64}], {}, Share(workers=8, cores=8, gpus=0)),
        ([{"CPU": 64}], {"cores": 16}, Share(workers=4, cores=16, gpus=0)),
        ([{"CPU": 64}], {"workers": 2}, Share(workers=2, cores=8, gpus=0)),
        ([{}, {"CPU": 2}, {"CPU": 12}], {}, Share(workers=7, cores=2, gpus=0)),
        ([{"CPU": 16, "GPU": 4}], {}, Share(workers=4, cores=4, gpus=1)),
        ([{"CPU": 8}, {"CPU": 16, "GPU": 1}, {"CPU": 4, "GPU": 2}], {}, Share(workers=3, cores=2, gpus=1)),
        ([{"CPU": 4, "GPU": 8}], {}, Share(workers=4, cores=1, gpus=1)),
        ([{"CPU": 2}], {"cores": 3}, "room for 0 engines of 3 processors, not for 1"),
        ([{"CPU": 2}], {"workers": 3, "cores": 1}, "room for 2 engines of 1 processors, not for 3"),
        ([{"CPU": 8, "GPU": 1}], {"workers": 2}, "room for 1 engines of 8 processors and a GPU, not for 2"),
        ([{}], {}, "room for 0 engines of 8 processors, not for 1"),
    ],
)
def test_cluster_is_divided(nodes: list[dict[str, float]], options: dict[str, int], share: Any) -> None:
    options_ = EmbedOptions(ray="auto", **options)  # type: ignore[arg-type]
    if isinstance(share, Share):
        assert divide(nodes, options_) == share
    else:
        with pytest.raises(ConfigError, match=share):
            divide(nodes, options_)
