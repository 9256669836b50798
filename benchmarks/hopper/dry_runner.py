"""Try run_lean.py's stand-ins without a GPU, over the tests' fakes of TensorRT and CUDA: `run.py --dry` calls this."""

import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from benchmarks.hopper.run_lean import BATCHES, BUILT_BY, Steps, host_code_allowed, open_runner
from tests.runtime.fake_tensorrt_without_gpu import FakeCuda, FakeEvent, FakeTensorRT, fake_answer, fake_plan

from trtower.flavour import LEAN

IMAGE, TOKENS = (3, 56, 56), (17, 64)
VERSION = "10.16.1.11"


def make_fakes() -> tuple[FakeCuda, FakeTensorRT, list[bool]]:
    """Replace torch's CUDA and the lean module in this process; the list notes whether host code was allowed."""
    cuda: Any = FakeCuda()
    for name in ("device", "current_stream", "get_device_capability", "stream"):
        setattr(torch.cuda, name, getattr(cuda, name))
    fakes: Any = torch.cuda
    fakes.Event, fakes.Stream, fakes.CUDAGraph = FakeEvent, cuda.new_stream, cuda.new_graph
    runner: Any = sys.modules["trtower.runners.tensorrt"]
    runner.ALIGNMENT = 1
    slot: Any = sys.modules["trtower.runners.slot"]
    slot.allocate = lambda size, device: torch.empty(64)
    fake: Any = FakeTensorRT(cuda, LEAN)
    fake.__version__ = VERSION
    allowed: list[bool] = []

    class Runtime(fake.Runtime):  # type: ignore[misc]
        engine_host_code_allowed = False

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            allowed.append(self.engine_host_code_allowed)
            self.engine_host_code_allowed = False  # the fake refuses all else
            return super().deserialize_cuda_engine(plan)

    fake.Runtime = Runtime
    sys.modules[LEAN] = fake
    return cuda, fake, allowed


def main() -> None:
    """Open the fake plan as run_lean.py does, and compare what is said and computed."""
    cuda, fake, allowed = make_fakes()
    folder = pathlib.Path(tempfile.mkdtemp())
    path = folder / "with-lean.plan"
    batches = (BATCHES.min, BATCHES.opt, BATCHES.max)
    path.write_bytes(fake_plan(("pixel_values", IMAGE), ("hidden_states", TOKENS), (batches,), says=("WARNING",)))
    images, tokens = torch.rand(5, *IMAGE).half(), torch.zeros(5, *TOKENS).half()
    steps = Steps(folder / "out.json", {})

    def open_it(version: str) -> Any:
        return open_runner(path, images, tokens, version, cuda_graphs=False)

    def run_it() -> str:
        with host_code_allowed(fake):
            runner = open_it(VERSION)
        runner.run(images, tokens)
        cuda.synchronize()
        return str(runner.name)

    steps.run("other version", lambda: open_it(BUILT_BY))
    steps.run("as it is", lambda: open_it(VERSION).name)
    steps.run("host code allowed", run_it)
    found = steps.found["steps"]
    expected = np.stack([fake_answer(image, TOKENS) for image in images.numpy()])
    checks = {
        "the version is refused": f"was built by tensorrt {BUILT_BY}, but"
        in found["other version"]["result"]["refused"],
        "the runner opens": "tensorrt-lean" in found["as it is"]["result"],
        "the stand-in has the runner's name": found["as it is"]["result"] == found["host code allowed"]["result"],
        "only the stand-in allows host code": allowed == [False, True],
        "TensorRT's words are kept": found["host code allowed"]["TensorRT says"] == ["fake line at WARNING"],
        "the answers are right": np.array_equal(tokens.numpy(), expected),
        "the lean module is back": sys.modules[LEAN] is fake,
    }
    wrong = [name for name, holds in checks.items() if not holds]
    if wrong:
        sys.exit(f"not so: {', '.join(wrong)}")
    print(f"{len(checks)} checks hold")


if __name__ == "__main__":
    main()
