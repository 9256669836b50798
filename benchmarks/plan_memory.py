"""Build a TensorRT-RTX plan of a graph; print its size and its scratch memory, which only the log of a build says.

python benchmarks/plan_memory.py GRAPH BATCH
"""

import json
import re
import sys

import tensorrt_rtx as trt


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps every message; the one wanted is verbose."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity: object, message: str) -> None:
        """Receive a message."""
        self.messages.append(message)


def build(path: str, batch: int) -> dict[str, int]:
    """Build the graph for up to ``batch`` images and return both sizes in bytes."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        raise SystemExit("\n".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    images = network.get_input(0)
    size = tuple(images.shape[1:])
    profile.set_shape(images.name, (1, *size), (batch, *size), (batch, *size))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit("\n".join(log.messages[-3:]))
    (memory,) = re.findall(r"Max Scratch Memory: (\d+) bytes", "\n".join(log.messages))
    return {"plan": plan.nbytes, "scratch": int(memory)}


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1], int(sys.argv[2]))))
