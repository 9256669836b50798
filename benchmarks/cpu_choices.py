"""Time the settings of ONNX Runtime and OpenVINO on a CPU, for ViT-L/14-336 and one image: `make cpu-choices`.

Each setting runs in its own process, twice in turn. The better median of seven calls counts, because disturbances only
ever make a run slower. The table marks the settings that trtower uses.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from trtower_export.pipeline import ExportOptions, export_tower

RECIPE = "openai/clip-vit-large-patch14-336"

ORT = """
import json, statistics, sys, time
import numpy as np, onnxruntime as ort
graph, dtype, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
options = ort.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = settings.pop("threads")
if level := settings.pop("level", None):
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
for key, value in settings.items():
    options.add_session_config_entry(key, value)
start = time.perf_counter()
session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
images = {session.get_inputs()[0].name: np.random.default_rng(0).standard_normal((1, 3, 336, 336)).astype(dtype)}
call = lambda: session.run(None, images)
"""

OPENVINO = """
import json, statistics, sys, time
import numpy as np, openvino as ov
graph, dtype, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
start = time.perf_counter()
request = ov.Core().compile_model(graph, "CPU", settings).create_infer_request()
images = np.random.default_rng(0).standard_normal((1, 3, 336, 336)).astype(dtype)
call = lambda: request.infer({0: images})
"""

TIMING = """
load_s = time.perf_counter() - start
call()
first_s = time.perf_counter() - start - load_s
seconds = []
for _ in range(7):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([load_s, first_s, statistics.median(seconds), int(peak) / 1e6]))
"""

THREADS = torch.get_num_threads()
NOT_REPACKED = {"session.disable_prepacking": "1"}
CHOICES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("ONNX Runtime, FP16 *", "fp16", ORT, {}),
    ("ONNX Runtime, FP16, one thread", "fp16", ORT, {"threads": 1}),
    ("ONNX Runtime, FP16, weights not repacked", "fp16", ORT, NOT_REPACKED),
    ("ONNX Runtime, FP16, threads sleep when idle", "fp16", ORT, {"session.intra_op.allow_spinning": "0"}),
    ("ONNX Runtime, FP16, extended optimisation", "fp16", ORT, {"level": "ORT_ENABLE_EXTENDED"}),
    ("ONNX Runtime, FP16, no optimisation", "fp16", ORT, {"level": "ORT_DISABLE_ALL"}),
    ("ONNX Runtime, FP32 *", "fp32", ORT, {}),
    ("ONNX Runtime, FP32, weights not repacked", "fp32", ORT, NOT_REPACKED),
    ("OpenVINO, FP16 graph in FP32 *", "fp16", OPENVINO, {"INFERENCE_PRECISION_HINT": "f32"}),
    ("OpenVINO, FP16 graph in BF16", "fp16", OPENVINO, {"INFERENCE_PRECISION_HINT": "bf16"}),
    ("OpenVINO, FP32 graph in FP32 *", "fp32", OPENVINO, {"INFERENCE_PRECISION_HINT": "f32"}),
    ("OpenVINO, FP32 graph in BF16", "fp32", OPENVINO, {"INFERENCE_PRECISION_HINT": "bf16"}),
)

with TemporaryDirectory() as folder:
    for precision in ("fp16", "fp32"):
        options = ExportOptions(random_weights=True, precision=precision, flavour="none", check=False)
        export_tower(RECIPE, Path(folder, precision), options)
    best: dict[str, list[float]] = {}
    for _ in range(2):
        for name, precision, script, settings in CHOICES:
            configured = {**({"threads": THREADS} if script is ORT else {"INFERENCE_NUM_THREADS": THREADS}), **settings}
            dtype = "float16" if precision == "fp16" else "float32"
            command = [sys.executable, "-c", script + TIMING, str(Path(folder, precision, "tower.onnx")), dtype]
            done = subprocess.run([*command, json.dumps(configured)], check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            best[name] = min(best.get(name, result), result, key=lambda each: each[2])
    print(f"{'setting':<44}  load s  first s  median ms  peak GB   ({THREADS} threads; * is used by trtower)")
    for name, (load_s, first_s, median_s, peak_gb) in best.items():
        print(f"{name:<44}  {load_s:6.2f}  {first_s:7.2f}  {median_s * 1e3:9.0f}  {peak_gb:7.2f}")
