"""Measure what this machine can multiply: the FLOP a second of a large matrix product, the best of who can compute it.

A floor is no spec sheet's: the clocks, the cores and the libraries are those of the run. On a CPU torch is not always
the fastest at it, so OpenVINO is asked too, and the better of them is the ceiling.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from trtower.dtypes import DTYPES
from trtower.errors import MissingExtraError
from trtower.extras import import_extra
from trtower.spec import EIGHT_BIT, PRECISIONS
from trtower_export.bench.race import race

SIZE = {"cpu": 3072, "cuda": 8192}
"""Rows and columns: 58 GFLOP a product on a CPU, 1100 on a GPU."""

TRIES = 5


def measure_ceilings(device: torch.device, arithmetics: Collection[str]) -> dict[str, float]:
    """Return FLOP a second by arithmetic.

    8 bits are left out, because what reaches them is not one product of one type, and so is FP16 on a CPU, which has no
    arithmetic for it, and torch a slow stand-in.
    """
    found = {}
    for arithmetic in sorted(arithmetics):
        if arithmetic in EIGHT_BIT or (device.type == "cpu" and arithmetic == "fp16"):
            continue
        products = {"torch": _torch_product(device, arithmetic)}
        if device.type == "cpu":
            products |= _openvino_product(arithmetic)
        seconds = race(products, rounds=TRIES)
        found[arithmetic] = 2 * SIZE[device.type] ** 3 / min(map(min, seconds.values()))  # the best: no median
    return found


def _torch_product(device: torch.device, arithmetic: str) -> Callable[[], object]:
    size = SIZE[device.type]
    left, right = (torch.randn(size, size).to(device, DTYPES[PRECISIONS[arithmetic].dtype]) for _ in range(2))
    return lambda: left @ right


def _openvino_product(arithmetic: str) -> dict[str, Callable[[], Any]]:
    try:
        ov = import_extra("openvino", extra="openvino", purpose="the ceiling")
    except MissingExtraError:
        return {}
    size = SIZE["cpu"]
    left, right = (torch.randn(size, size).numpy() for _ in range(2))
    given = ov.opset13.parameter([size, size], ov.Type.f32)
    model = ov.Model([ov.opset13.matmul(given, ov.opset13.constant(right), False, False)], [given])
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[arithmetic].openvino,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    # The closure keeps `left`: a tensor that shares its memory does not own it.
    return {"openvino": lambda: request.infer({0: ov.Tensor(left, shared_memory=True)})}
