"""Measure what NVIDIA Triton adds to a tower, against the same tower in process, in turn in one run.

    make bench-serving

Exports the small tower of embed.py, serves it with the real tritonserver of the nvidia-pytriton wheel, and measures:

- one image: the bare call in this process, and the round trip over gRPC, over HTTP and over gRPC with shared memory;
- many: the rate in process, at the best batch of the profiles, and that of 16 clients with one image each at a time.

Clients, server and engine share the processors of this machine. This is not a test: the times depend on the machine.
"""

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
import tritonclient.utils.shared_memory as shm
from benchmarks.embed import TOWER
from tests.serving.triton_server import serving

from trtower import VisionTower
from trtower.serving.triton.config import TritonOptions
from trtower.serving.triton.repository import write_repository
from trtower.spec import profile_batches
from trtower_export.pipeline import ExportOptions, export_tower

ROUNDS, CALLS, CLIENTS, SECONDS = 5, 200, 16, 5.0


def main() -> None:
    """Measure everything and print it as JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)).save_pretrained(folder / "checkpoint")
        options = ExportOptions(check=False, flavour="none")
        bundle = export_tower(str(folder / "checkpoint"), folder / "small", options).path
        write_repository([bundle], folder / "models", TritonOptions(allow_uncertified=True))
        tower = VisionTower.load(bundle)
        with serving(folder / "models", folder) as server:
            print(json.dumps(measure(tower, server), indent=2))


def measure(tower: VisionTower, server: Any) -> dict[str, Any]:
    """Measure in turn, so that what else the machine does meets all alike."""
    array = np.random.default_rng(0).standard_normal((1, *tower.bundle.manifest.input.row)).astype(np.float16)
    image = torch.from_numpy(array)
    ways: dict[str, Callable[[], object]] = {
        "bare call": lambda: tower(image),
        "grpc": asker(over_grpc, server.grpc, array),
        "http": asker(over_http, server.http, array),
        "grpc, shared memory": shared_asker(server.grpc, array, tower),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {"in process": [], "16 clients, grpc": [], "16 clients, shared memory": []}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            times[name] += timed(call)
        rates["in process"].append(
            max(rate_of(tower, array, size) for size in profile_batches(tower.bundle.manifest.profiles))
        )
        rates["16 clients, grpc"].append(rate_of_clients(lambda: asker(over_grpc, server.grpc, array)))
        rates["16 clients, shared memory"].append(rate_of_clients(lambda: shared_asker(server.grpc, array, tower)))
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


def timed(call: Callable[[], object]) -> list[float]:
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


def rate_of_clients(connect: Callable[[], Callable[[], object]]) -> float:
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


def asker(library: Any, address: str, array: Any) -> Callable[[], object]:
    """Return a call to the server."""
    client = library.InferenceServerClient(address)
    tensor = library.InferInput("pixel_values", array.shape, "FP16")

    def call() -> object:
        tensor.set_data_from_numpy(array)
        return client.infer("small", [tensor]).as_numpy("hidden_states")

    return call


def shared_asker(address: str, array: Any, tower: VisionTower) -> Callable[[], object]:
    """Return a call to a server on the same machine, through shared memory."""
    client, name = over_grpc.InferenceServerClient(address), f"bench-{threading.get_ident()}-{time.time_ns()}"
    size = 2 * int(np.prod(tower.feature_shape))
    regions = {"in": array.nbytes, "out": size}
    handles = {}
    for side, length in regions.items():
        handles[side] = shm.create_shared_memory_region(f"{name}-{side}", f"/{name}-{side}", length)
        client.register_system_shared_memory(f"{name}-{side}", f"/{name}-{side}", length)
    tensor = over_grpc.InferInput("pixel_values", array.shape, "FP16")
    tensor.set_shared_memory(f"{name}-in", array.nbytes)
    output = over_grpc.InferRequestedOutput("hidden_states")
    output.set_shared_memory(f"{name}-out", size)

    def call() -> object:
        shm.set_shared_memory_region(handles["in"], [array])
        client.infer("small", [tensor], outputs=[output])
        return shm.get_contents_as_numpy(handles["out"], np.float16, (1, *tower.feature_shape))

    return call


if __name__ == "__main__":
    main()
