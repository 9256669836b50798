"""Measure what Ray Serve adds to a tower, against the same tower in process, in turn in one run.

    make bench-serving

Exports the small tower of embed.py, serves one replica of it on a cluster of this machine, and measures:

- one image: the bare call in this process, and the round trip over gRPC and by a handle;
- many: the rate in process, at the best batch of the profiles, and that of 16 clients with one image each at a time.

Clients, Ray and engine share the processors of this machine. This is not a test: the times depend on the machine.
"""

import json
import logging
import os
import tempfile
from pathlib import Path

import ray
import tritonclient.grpc as over_grpc
from benchmarks.servers import Call, asker, export_small, measure, one_image
from ray import serve
from tests.serving.triton_server import free_port

from trtower import VisionTower
from trtower.serving.ray import RayOptions, bind_tower


def main() -> None:
    """Measure everything and print it as JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        bundle = export_small(Path(temporary))
        tower = VisionTower.load(bundle)
        array = one_image(tower)
        port = free_port()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        serve.start(grpc_options={"port": port, "grpc_servicer_functions": ["trtower.serving.ray.add_open_inference"]})
        processors = {"num_cpus": os.cpu_count()}
        handle = serve.run(bind_tower(bundle, RayOptions(allow_uncertified=True), ray_actor_options=processors))

        def ask_handle() -> object:
            return handle.remote(array).result()

        def connect() -> Call:
            return asker(over_grpc, over_grpc.InferenceServerClient(f"localhost:{port}"), array)

        ways = {"grpc": connect(), "handle": ask_handle}
        print(json.dumps(measure(tower, array, ways, {"16 clients, grpc": connect}), indent=2))
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
