"""Measure the ceiling of this machine: the FLOP per second of a large matrix product.

The ceiling does not come from a spec sheet: clocks, cores and libraries are those of the run. On a CPU torch is not
always the fastest, so OpenVINO is measured too, and the better one is the ceiling.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from trtower.dtypes import DTYPES
from trtower.errors import MissingExtraError
from trtower.extras import import_extra
from trtower.runners.race import race
from trtower.spec import EIGHT_BIT, PRECISIONS

SIZE = {"cpu": 3072, "cuda": 8192}
"""Rows and columns: 58 GFLOP per product on a CPU, 1100 on a GPU."""

TRIES = 5


def measure_ceilings(device: torch.device, arithmetics: Collection[str]) -> dict[str, float]:
    """Return FLOP per second by arithmetic.

    8 bits are left out, because they are not a single product of a single type. FP16 on a CPU is left out, because the
    CPU has no FP16 arithmetic and torch only a slow substitute.
    """
    ceilings = {}
    for arithmetic in sorted(arithmetics):
        if arithmetic in EIGHT_BIT or (device.type == "cpu" and arithmetic == "fp16"):
            continue
        products = {"torch": _torch_product(device, arithmetic)}
        if device.type == "cpu":
            products |= _openvino_product(arithmetic)
        seconds = race(products, rounds=TRIES)
        ceilings[arithmetic] = 2 * SIZE[device.type] ** 3 / min(map(min, seconds.values()))  # the best, not the median
    return ceilings


def _torch_product(device: torch.device, arithmetic: str) -> Callable[[], object]:
    size = SIZE[device.type]
    left, right = (torch.randn(size, size).to(device, DTYPES[PRECISIONS[arithmetic].dtype]) for _ in range(2))
    return lambda: left @ right


def _openvino_product(arithmetic: str) -> dict[str, Callable[[], Any]]:
    try:
        ov = import_extra("openvino", extra="openvino", purpose="measuring the ceiling")
    except MissingExtraError:
        return {}
    size = SIZE["cpu"]
    left, right = (torch.randn(size, size).numpy() for _ in range(2))
    parameter = ov.opset13.parameter([size, size], ov.Type.f32)
    model = ov.Model([ov.opset13.matmul(parameter, ov.opset13.constant(right), False, False)], [parameter])
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[arithmetic].openvino,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    # The closure keeps `left` alive: a tensor that shares memory does not own it.
    return {"openvino": lambda: request.infer({0: ov.Tensor(left, shared_memory=True)})}
