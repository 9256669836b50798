"""Run a plan with the TensorRT 8.6.0 that built it, by bare calls, and time it. Needs Python 3.10 and no PyTorch.

    python3.10 run_own.py FOLDER NAME OUT.json

Reads NAME.plan and images.f16 in FOLDER, and writes the hidden states of all images to NAME.own.f16, for compare.py.
OUT.json gets the times. This is the control: it tells a bad plan from a lean runtime that does not take it. GPU memory,
stream and events come from CUDA's driver, through ctypes.
"""

import ctypes
import json
import math
import os
import pathlib
import statistics
import sys
from typing import Any

sys.setdlopenflags(os.RTLD_LAZY)
import tensorrt as trt  # noqa: E402

BATCHES, ROUNDS, ITEM = (1, 8, 32), 60, 2


class Driver:
    """The few calls of CUDA's driver that are needed; each raises RuntimeError if it fails."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the one that TensorRT uses
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver."""
        if error := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} gave CUDA error {error}")

    def create(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver that returns a handle or an address through its first argument."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made


def main() -> None:
    """Run all images at once, keep the answers, then time each batch size."""
    folder, name, out = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
    driver = Driver()
    runtime = trt.Runtime(trt.Logger(trt.Logger.INFO))
    runtime.engine_host_code_allowed = True  # for a plan with a lean runtime inside; we built it ourselves
    engine = runtime.deserialize_cuda_engine((folder / f"{name}.plan").read_bytes())
    if engine is None:
        sys.exit(f"TensorRT {trt.__version__} did not load {name}.plan; its reason stands above")
    context = engine.create_execution_context()
    images = (folder / "images.f16").read_bytes()
    one, most = tuple(engine.get_tensor_shape("pixel_values"))[1:], max(BATCHES)
    answer = ctypes.create_string_buffer(most * math.prod(tuple(engine.get_tensor_shape("hidden_states"))[1:]) * ITEM)
    given = driver.create("cuMemAlloc_v2", ctypes.c_size_t(len(images)))
    made = driver.create("cuMemAlloc_v2", ctypes.c_size_t(len(answer)))
    stream = driver.create("cuStreamCreate", 1)
    marks = [driver.create("cuEventCreate", 0) for _ in range(2)]
    driver.call("cuMemcpyHtoD_v2", given, images, ctypes.c_size_t(len(images)))

    def enqueue(batch: int) -> None:
        accepted = (
            context.set_input_shape("pixel_values", (batch, *one))
            and context.set_tensor_address("pixel_values", given.value)
            and context.set_tensor_address("hidden_states", made.value)
            and context.execute_async_v3(stream.value)
        )
        if not accepted:
            raise RuntimeError(f"TensorRT refused a batch of {batch}")

    def time_ms(batch: int) -> float:
        elapsed = ctypes.c_float()
        driver.call("cuEventRecord", marks[0], stream)
        enqueue(batch)
        driver.call("cuEventRecord", marks[1], stream)
        driver.call("cuStreamSynchronize", stream)
        driver.call("cuEventElapsedTime", ctypes.byref(elapsed), *marks)
        return elapsed.value

    enqueue(most)
    driver.call("cuStreamSynchronize", stream)
    driver.call("cuMemcpyDtoH_v2", answer, made, ctypes.c_size_t(len(answer)))
    (folder / f"{name}.own.f16").write_bytes(answer.raw)
    times = {batch: statistics.median([time_ms(batch) for _ in range(5 + ROUNDS)][5:]) for batch in BATCHES}
    out.write_text(json.dumps({"tensorrt": trt.__version__, "plan": name, "ms": times}, indent=2) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
