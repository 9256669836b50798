"""Compare the two graphs of a bundle, attention spelled out and fused, on ViT-L/14-336: `make graph-forms`.

On the CPU both run in turn in one process, on one image; the best of seven calls counts, because disturbances only ever
make a call slower. The plans are TensorRT-RTX's portable ones. A fused attention leaves no room for a score matrix in a
plan's scratch memory; to tell, a DINOv2 at 518 pixels is built too, whose scores are larger than all else. FP32 bundles
have one graph, and its plan is not fused.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH
from trtower_export.bench.environment import describe_environment
from trtower_export.pipeline import ExportOptions, export_tower

RECIPE, MANY_TOKENS = "openai/clip-vit-large-patch14-336", "facebook/dinov2-large"
MEMORY = Path(__file__).with_name("plan_memory.py")
RESULTS = Path(__file__).with_name("results") / "graph_forms.json"
BATCH = 8
ROUNDS = 7

Call = Callable[[], Any]


def open_onnxruntime(graph: Path, images: "np.ndarray[Any, Any]") -> Call:
    """Open a graph with ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"pixel_values": images})[0]


def open_openvino(hint: str) -> Callable[[Path, "np.ndarray[Any, Any]"], Call]:
    """Return a function that opens a graph with OpenVINO in a precision."""

    def open_graph(graph: Path, images: "np.ndarray[Any, Any]") -> Call:
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        request = openvino.Core().compile_model(str(graph), "CPU", settings).create_infer_request()
        return lambda: request.infer({0: images})[0]

    return open_graph


OPENERS = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino("f32"),
    "openvino-bf16": open_openvino("bf16"),
}


def race(calls: dict[str, Call]) -> dict[str, float]:
    """Return the best time of each call, in seconds, after one uncounted call each."""
    best = dict.fromkeys(calls, float("inf"))
    for round_ in range(ROUNDS + 1):
        for name, call in calls.items():
            time.sleep(0.02)
            start = time.perf_counter()
            call()
            if round_:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def plan_of(graph: Path, tokens: int, heads: int, itemsize: int) -> dict[str, float]:
    """Build a graph and return the plan's size in bytes, and its scratch memory as a share of all scores."""
    printed = subprocess.run(
        [sys.executable, str(MEMORY), str(graph), str(BATCH)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    result = json.loads(printed)
    return {"plan": result["plan"], "scratch_by_scores": result["scratch"] / (BATCH * heads * tokens**2 * itemsize)}


def measure(bundle: Bundle, graph: str) -> dict[str, float]:
    """Measure the plan of one graph."""
    config = json.loads((bundle.path / "config.json").read_text())
    itemsize = 4 if bundle.manifest.precision == "fp32" else 2
    return plan_of(bundle.path / graph, bundle.manifest.spec.num_tokens, config["num_attention_heads"], itemsize)


def main(folder: Path) -> None:
    """Measure both graphs in every precision, print the ratios and write the results."""
    results: dict[str, Any] = {"environment": describe_environment(torch.device("cpu"))}
    for precision in ("fp16", "bf16", "fp32"):
        options = ExportOptions(precision=precision, flavour="none", random_weights=True, check=False, overwrite=True)
        bundle = export_tower(RECIPE, folder / precision, options)
        long = export_tower(MANY_TOKENS, folder / f"{precision}-518", options)
        graphs = [name for name in (GRAPH, FUSED_GRAPH) if (bundle.path / name).exists()]
        plans = {}
        for name in graphs:
            if (precision, name) != ("fp32", FUSED_GRAPH):
                plans[name] = {"336": measure(bundle, name), "518": measure(long, name)}
        seconds, differences = {}, {}
        if precision != "bf16":  # ONNX Runtime has no BF16 kernels for the CPU
            size = bundle.manifest.spec.image_size
            images = np.random.default_rng(0).standard_normal((1, 3, size, size))
            images = images.astype(bundle.manifest.input.dtype)
            for backend, open_graph in OPENERS.items():
                calls = {name: open_graph(bundle.path / name, images) for name in graphs}
                answers = [call().astype(np.float64) for call in calls.values()]
                seconds[backend] = race(calls)
                scale = float(np.linalg.norm(answers[0]))
                differences[backend] = [float(np.linalg.norm(each - answers[0])) / scale for each in answers]
        results[precision] = {"plans": plans, "seconds": seconds, "differences": differences}
        report(precision, results[precision])
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def report(precision: str, result: dict[str, Any]) -> None:
    """Print what was measured in one precision."""
    for name, plans in result["plans"].items():
        for size, plan in plans.items():
            scratch = f"scratch memory {plan['scratch_by_scores']:.2f} of all scores"
            print(f"{precision}  {name:<17}  {size} pixels: plan {plan['plan'] / 1e6:.1f} MB, {scratch}", flush=True)
    for backend, seconds in result["seconds"].items():
        spelled_out, *fused = seconds.values()
        ratio = f", fused {fused[0] / spelled_out:.3f} times as long" if fused else ""
        difference = f", relative difference {result['differences'][backend][-1]:.1e}" if fused else ""
        print(f"{precision}  {backend:<14} spelled out {spelled_out:.3f} s{ratio}{difference}", flush=True)


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        main(Path(temporary))
