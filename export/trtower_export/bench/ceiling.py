"""Measure what this machine can multiply: the FLOP a second of a large matrix product, the best of who can compute it.

A floor is no spec sheet's: the clocks, the cores and the libraries are those of the run. On a CPU torch is not always
the fastest at it, so OpenVINO is asked too, and the better of them is the ceiling.
"""

import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from trtower.errors import MissingExtraError
from trtower.extras import import_extra
from trtower.runners.openvino import HINTS
from trtower.spec import PRECISIONS

SIZE = {"cpu": 3072, "cuda": 8192}
"""Rows and columns: 58 GFLOP a product on a CPU, 1100 on a GPU."""

TRIES = 5

SLOW = ("fp16",)
"""What a CPU has no arithmetic for, and torch a slow stand-in."""


def measure_ceilings(device: torch.device, arithmetics: Collection[str]) -> dict[str, float]:
    """Give FLOP a second by arithmetic. 8 bits are left out: what reaches them is not one product of one type."""
    found = {}
    for arithmetic in sorted(arithmetics):
        if arithmetic not in ("fp32", "fp16", "bf16") or (device.type == "cpu" and arithmetic in SLOW):
            continue
        products = [_torch_product(device, arithmetic)]
        if device.type == "cpu":
            products += _openvino_product(arithmetic)
        found[arithmetic] = max(2 * SIZE[device.type] ** 3 / _best_s(device, product) for product in products)
    return found


def _best_s(device: torch.device, product: Callable[[], object]) -> float:
    """Give the shortest of some runs, after one that does not count: a ceiling is not a median."""
    seconds = []
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _torch_product(device: torch.device, arithmetic: str) -> Callable[[], object]:
    size = SIZE[device.type]
    left, right = (torch.randn(size, size).to(device, getattr(torch, PRECISIONS[arithmetic])) for _ in range(2))
    return lambda: left @ right


def _openvino_product(arithmetic: str) -> list[Callable[[], Any]]:
    try:
        ov = import_extra("openvino", extra="openvino", purpose="the ceiling")
    except MissingExtraError:
        return []
    size = SIZE["cpu"]
    left, right = (torch.randn(size, size).numpy() for _ in range(2))
    given = ov.opset13.parameter([size, size], ov.Type.f32)
    model = ov.Model([ov.opset13.matmul(given, ov.opset13.constant(right), False, False)], [given])
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[arithmetic],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return [lambda: request.infer({0: ov.Tensor(left, shared_memory=True)})]  # which does not own its memory
