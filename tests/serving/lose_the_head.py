"""Serve a bundle on a cluster of its own, kill the head, and print what clients are told: one line a change.

    python -m tests.serving.lose_the_head BUNDLE

It is a program of its own, because Ray ends processes that lose the head to which they are connected.
"""

import os
import sys
import time

import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.serving.towers import pixels
from tests.serving.triton_server import free_port
from trtower import VisionTower
from trtower.serving.ray import RayOptions, bind_tower

SECONDS = 20.0


def main(bundle: str) -> None:
    """Run it."""
    import tritonclient.grpc as over_grpc
    from tritonclient.utils import InferenceServerException

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    port = free_port()
    serve.start(
        proxy_location="HeadOnly",
        http_options={"port": free_port()},
        grpc_options={"port": port, "grpc_servicer_functions": ["trtower.serving.ray.add_open_inference"]},
    )
    serve.run(bind_tower(bundle, RayOptions(name="tower", backend="openvino", allow_uncertified=True)))
    array = pixels(VisionTower(bundle), 1)

    def ask() -> str:
        tensor = over_grpc.InferInput("pixel_values", array.shape, "FP32")
        tensor.set_data_from_numpy(array)
        try:
            with over_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
                client.infer("tower", [tensor], client_timeout=SECONDS)
        except InferenceServerException as err:
            return str(err.status())
        return "answered"

    last = ""
    killed: float | None = None
    while killed is None or time.monotonic() < killed + SECONDS:
        told = ask()
        if told != last:
            print(told, flush=True)
            last = told
        if killed is None:
            cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
            killed = time.monotonic()
        time.sleep(0.2)
    print(f"after {SECONDS:.0f} s: {last}", flush=True)
    os._exit(0)  # Ray's own end would look for the head


if __name__ == "__main__":
    main(sys.argv[1])
