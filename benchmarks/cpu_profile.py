"""Show where OpenVINO's time goes in one image of ViT-L/14-336: `make cpu-profile`.

First OpenVINO's own profile of the rehearsal in each precision, beside a large product in PyTorch; then linear layers
of different numbers of rows by themselves, in BF16: a tower with a class token has one row more than a multiple of 64.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openvino as ov
import torch
from torch.nn import functional

from trtower.runners.choose import candidates, choose
from trtower.runners.race import draw_inputs
from trtower_export.pipeline import ExportOptions, export_tower

RECIPE = "openai/clip-vit-large-patch14-336"
BACKENDS = {"bf16": ("openvino-bf16",), "int8": ("openvino-int8", "openvino-bf16")}
CALLS = 7
ROWS = (576, 577, 608, 640, 641)
SHOWN = 6


def median_of(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, after one uncounted."""
    call()
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def profile(folder: Path, precision: str) -> None:
    """Print how long one image takes, and on which kinds of node."""
    square = torch.randn(4096, 4096).bfloat16()
    bundle = export_tower(
        RECIPE, folder / precision, ExportOptions(random_weights=True, precision=precision, check=False, flavour="none")
    )
    images = draw_inputs(bundle.manifest, 1)
    for backend in BACKENDS[precision]:
        (candidate,) = candidates(bundle, backend=backend)
        if candidate.obstacle:
            print(f"{precision} on {backend}: {candidate.obstacle}\n")
            continue
        runner: Any = choose(bundle, backend)
        taken = images.to(runner.pixel_dtype)
        features = torch.empty((1, *bundle.manifest.output.row), dtype=runner.dtype)
        whole = median_of(partial(runner.run, taken, features))
        product = 2 * 4096**3 / median_of(lambda: square @ square)
        share = f"{bundle.manifest.cut.flop / whole / product:.0%} of a BF16 product, {product / 1e12:.2f} TFLOP/s"
        print(f"{precision} on {backend}: {whole * 1e3:.0f} ms, {share}")
        with runner._requests.lend() as request:
            rows = [each for each in request.get_profiling_info() if str(each.status).endswith("EXECUTED")]
        spent, number = Counter[str](), Counter[str]()
        for each in rows:
            kind = f"{each.node_type}, {each.exec_type}"
            spent[kind] += each.real_time.total_seconds()
            number[kind] += 1
        for kind, seconds in spent.most_common(SHOWN):
            print(f"  {seconds * 1e3:7.1f} ms  {number[kind]:4} x {kind}")
        runner.close()
        print(flush=True)


def linear_layers() -> None:
    """Print the speed of a linear layer for several numbers of rows."""
    print("1024 -> 4096 in BF16, TFLOP/s:  rows  OpenVINO  PyTorch  PyTorch, weights laid out once")
    operators: Any = torch.ops.mkldnn
    weight = torch.randn(4096, 1024).bfloat16()
    packed = operators._reorder_linear_weight(weight, ROWS[0])
    for rows in ROWS:
        pixels = ov.op.Parameter(ov.Type.f32, ov.PartialShape([-1, 1024]))
        product = ov.opset13.matmul(pixels, ov.op.Constant(weight.float().numpy()), False, True)
        settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = ov.Core().compile_model(ov.Model([product], [pixels]), "CPU", settings).create_infer_request()
        x = torch.randn(rows, 1024)
        request.set_input_tensor(ov.Tensor(x.numpy()))
        half = x.bfloat16()
        calls: list[Callable[[], object]] = [
            request.infer,
            partial(functional.linear, half, weight),
            partial(operators._linear_pointwise, half, packed, None, "none", [], ""),
        ]
        speeds = [2 * rows * weight.numel() / median_of(call) / 1e12 for call in calls]
        print(f"{rows:36}{speeds[0]:10.2f}{speeds[1]:9.2f}{speeds[2]:9.2f}", flush=True)


if __name__ == "__main__":
    compile_model = ov.Core.compile_model
    ov.Core.compile_model = lambda self, model, device, settings: compile_model(
        self, model, device, {**settings, "PERF_COUNT": True}
    )
    print(f"{torch.get_num_threads()} threads")
    with TemporaryDirectory() as folder:
        for precision in sys.argv[1:] or BACKENDS:
            profile(Path(folder), precision)
    linear_layers()
