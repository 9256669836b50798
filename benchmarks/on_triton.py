"""Measure what NVIDIA Triton adds to a tower, against the same tower in process, in turn in one run.

    make bench-serving

Exports the small tower of embed.py, serves it with the real tritonserver of the nvidia-pytriton wheel, and measures:

- one image: the bare call in this process, and the round trip over gRPC, over HTTP and over gRPC with shared memory;
- many: the rate in process, at the best batch of the profiles, and that of 16 clients with one image each at a time.

Clients, server and engine share the processors of this machine. This is not a test: the times depend on the machine.
"""

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
import tritonclient.utils.shared_memory as shm
from benchmarks.servers import Call, asker, export_small, measure, one_image
from tests.serving.triton_server import serving

from trtower import VisionTower
from trtower.serving.triton.config import TritonOptions
from trtower.serving.triton.repository import write_repository


def main() -> None:
    """Measure everything and print it as JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = export_small(folder)
        write_repository([bundle], folder / "models", TritonOptions(allow_uncertified=True))
        tower = VisionTower.load(bundle)
        array = one_image(tower)
        with serving(folder / "models", folder) as server, over_http.InferenceServerClient(server.http) as http:

            def connect() -> Call:
                return asker(over_grpc, over_grpc.InferenceServerClient(server.grpc), array)

            def share() -> Call:
                return shared_asker(server.grpc, array, tower)

            ways = {"grpc": connect(), "http": asker(over_http, http, array), "grpc, shared memory": share()}
            clients = {"16 clients, grpc": connect, "16 clients, shared memory": share}
            print(json.dumps(measure(tower, array, ways, clients), indent=2))


def shared_asker(address: str, array: Any, tower: VisionTower) -> Call:
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
