"""What the measurements of servers share: the small tower, timing calls, and the rate of many clients."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from benchmarks.embed import TOWER

from trtower import VisionTower
from trtower.spec import profile_batches
from trtower_export.pipeline import ExportOptions, export_tower

ROUNDS, CALLS, CLIENTS, SECONDS = 5, 200, 16, 5.0

Call = Callable[[], object]


def export_small(folder: Path) -> Path:
    """Export the small tower of embed.py, called "small"."""
    torch.manual_seed(0)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)).save_pretrained(folder / "checkpoint")
    return export_tower(str(folder / "checkpoint"), folder / "small", ExportOptions(check=False, flavour="none")).path


def one_image(tower: VisionTower) -> Any:
    """Make an image that clients send, as an array of FP16."""
    return np.random.default_rng(0).standard_normal((1, *tower.bundle.manifest.input.row)).astype(np.float16)


def measure(
    tower: VisionTower, array: Any, ways: Mapping[str, Call], connect: Mapping[str, Callable[[], Call]]
) -> dict[str, Any]:
    """Measure the bare call and other ways of one image, and the rates of clients that each ``connect`` by themselves.

    All are measured in turn, so that what else the machine does meets them alike.
    """
    image = torch.from_numpy(array)
    ways = {"bare call": lambda: tower(image), **ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ("in process", *connect)}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            times[name] += timed(call)
        rates["in process"].append(
            max(rate_of(tower, array, size) for size in profile_batches(tower.bundle.manifest.profiles))
        )
        for name, open_client in connect.items():
            rates[name].append(rate_of_clients(open_client))
    medians = {name: statistics.median(each) * 1e3 for name, each in times.items()}
    found = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "ms_one_image": {name: round(ms, 2) for name, ms in medians.items()},
        "ms_added": {name: round(ms - medians["bare call"], 2) for name, ms in medians.items()},
        "images_per_second": {name: round(rate) for name, rate in found.items()},
        "of_in_process": {name: round(rate / found["in process"], 3) for name, rate in found.items()},
        "all_rates": {name: [round(rate) for rate in each] for name, each in rates.items()},
        "bytes": {"in": array.nbytes, "out": 2 * int(np.prod(tower.feature_shape))},
        "backend": tower.backend,
        "processors": os.cpu_count(),
    }


def timed(call: Call) -> list[float]:
    """Time calls, after a few that do not count."""
    for _ in range(10):
        call()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def rate_of(tower: VisionTower, array: Any, size: int) -> float:
    """Return the rate of the tower in this process."""
    images = torch.from_numpy(np.repeat(array, size, axis=0))
    tower(images)
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS / 3:
        tower(images)
        calls += 1
    return size * calls / (time.perf_counter() - start)


def rate_of_clients(connect: Callable[[], Call]) -> float:
    """Return the rate of several clients together."""
    done = [0] * CLIENTS
    begin, end = threading.Barrier(CLIENTS + 1), threading.Event()

    def run(index: int) -> None:
        call = connect()
        call()
        begin.wait()
        while not end.is_set():
            call()
            done[index] += 1

    threads = [threading.Thread(target=run, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    time.sleep(SECONDS)
    rate = sum(done) / (time.perf_counter() - start)
    end.set()
    for thread in threads:
        thread.join()
    return rate


def asker(library: Any, client: Any, array: Any) -> Call:
    """Return a call to the server, with a client of one of tritonclient's libraries."""
    tensor = library.InferInput("pixel_values", array.shape, "FP16")

    def call() -> object:
        tensor.set_data_from_numpy(array)
        return client.infer("small", [tensor]).as_numpy("hidden_states")

    return call
