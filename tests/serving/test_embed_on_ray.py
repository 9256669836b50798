"""On real Ray, `embed_pictures` writes the same files as in one process, also if a node dies under it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pictures import fill
from trtower import (
    BackendError,
    BuildError,
    BundleError,
    ConfigError,
    EmbedOptions,
    EmbedProgress,
    Features,
    InputError,
    embed_pictures,
)

ray = pytest.importorskip("ray", reason="Ray has an environment of its own: make test-serving")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's code warns of itself, in many places

SMALL: dict[str, Any] = {"pictures_per_file": 4, "batch_size": 2, "threads": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start three nodes on this machine: a head without processors, and two of two each."""
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    fill(tmp_path / "photos", range(40))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def embed(pictures: Path, bundle: Path, out: Path, **options: Any) -> Features:
    return embed_pictures(pictures, bundle, out, EmbedOptions(**SMALL | options))


def contents(features: Features) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in features.files}


@pytest.mark.parametrize("format_", ["parquet", "safetensors"])
def test_cluster_writes_the_same_files(
    cluster: Any, certified: Path, photos: Path, tmp_path: Path, format_: str
) -> None:
    told: list[EmbedProgress] = []
    here = embed(photos, certified, tmp_path / "here", format=format_)
    options = EmbedOptions(**SMALL, format=format_, ray=cluster.address, workers=2, cores=1)
    there = embed_pictures(photos, certified, tmp_path / "there", options, on_progress=told.append)
    assert contents(there) == contents(here)
    assert there.left_out == here.left_out
    assert (told[0].done, told[-1].done, told[-1].total) == (0, 41, 41)
    assert not ray.is_initialized()


def test_rest_may_be_done_elsewhere(cluster: Any, certified: Path, photos: Path, tmp_path: Path) -> None:
    here = embed(photos, certified, tmp_path / "here")
    there = embed(photos, certified, tmp_path / "there", ray=cluster.address, cores=1)
    for index in (2, 5, 6):
        there.files[index].unlink()
    assert contents(embed(photos, certified, tmp_path / "there")) == contents(here)
    for index in (0, 7):
        here.files[index].unlink()
    assert contents(embed(photos, certified, tmp_path / "here", ray=cluster.address, cores=1)) == contents(there)


def test_killed_node_loses_and_doubles_nothing(cluster: Any, certified: Path, photos: Path, tmp_path: Path) -> None:
    fill(photos, range(40, 160))
    here = embed(photos, certified, tmp_path / "here")
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    killed = False

    def kill(progress: EmbedProgress) -> None:
        nonlocal killed
        if progress.done and not killed:
            killed = True
            cluster.remove_node(node, allow_graceful=False)

    options = EmbedOptions(**SMALL, ray=cluster.address, workers=3, cores=2)
    there = embed_pictures(photos, certified, tmp_path / "there", options, on_progress=kill)
    assert killed
    assert contents(there) == contents(here)


def test_actor_that_dies_is_replaced(cluster: Any, certified: Path, photos: Path, tmp_path: Path) -> None:
    fill(photos, range(40, 100))
    here = embed(photos, certified, tmp_path / "here")
    killed: list[int] = []

    def kill(progress: EmbedProgress) -> None:
        if progress.done and not killed:
            actors = [each for each in psutil.process_iter(["name"]) if "MapWorker" in (each.info["name"] or "")]
            os.kill(actors[0].pid, signal.SIGKILL)
            killed.append(actors[0].pid)

    options = EmbedOptions(**SMALL, ray=cluster.address, workers=2, cores=1)
    there = embed_pictures(photos, certified, tmp_path / "there", options, on_progress=kill)
    assert killed
    assert contents(there) == contents(here)


def test_errors_are_our_own(cluster: Any, certified: Path, fp32_bundle: Path, photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ray": cluster.address, "cores": 1}
    with pytest.raises(BundleError, match="is not certified") as caught:
        embed(photos, fp32_bundle, tmp_path / "out", **options)
    assert type(caught.value) is BundleError
    assert str(caught.value).startswith(f"{fp32_bundle} is not certified: it has no certificate.")
    with pytest.raises(BackendError, match="no requested backend can run"):
        embed(photos, certified, tmp_path / "out", backend="tensorrt", **options)
    with pytest.raises(ConfigError, match="has room for 4 engines of 1 processors, not for 5"):
        embed(photos, certified, tmp_path / "out", workers=5, **options)
    with pytest.raises(InputError, match="none of 1 pictures"):
        embed(photos / "bad.png", certified, tmp_path / "bad", **options)
    assert not ray.is_initialized()


def test_full_disk_is_said(cluster: Any, certified: Path, photos: Path, tmp_path: Path, small_disk: Path) -> None:
    fill(photos, range(40, 400))
    with pytest.raises(BuildError, match=r"^the disk filled up while writing .*features-"):
        embed(photos, certified, small_disk / "out", ray=cluster.address, cores=1, pictures_per_file=50)
    assert not [*(small_disk / "out").glob(".*.staging")]
    assert not ray.is_initialized()


def test_process_that_is_connected_stays_so(cluster: Any, certified: Path, photos: Path, tmp_path: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        assert len(embed(photos, certified, tmp_path / "out", ray="auto")) == 40
        assert ray.is_initialized()
    finally:
        ray.shutdown()
