"""Run a plan of TensorRT 8.6.0 with a later lean runtime: by bare calls, then through trtower's own runner.

    python benchmarks/hopper/run_lean.py FOLDER NAME OUT.json

Reads NAME.plan and answers.pt in FOLDER. Every step writes OUT.json anew, with what TensorRT said meanwhile, so that
what was learnt stays if the next step fails or ends the process. A refusal is a result too. run.py sets the
environment.

trtower runs a plan only on the version that built it, and never lets it bring code. Both rules are broken here, in this
process only: `HostCodeAllowed` stands in for the lean module, and the plan's entry names the version of the runtime.
"""

import ctypes
import json
import logging
import pathlib
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from benchmarks.hopper.compare import distance
from benchmarks.hopper.graph17 import draw_tower

from trtower.bundle.manifest import BuildSettings, PlanEntry
from trtower.flavour import LEAN, PLATFORM, load_lean
from trtower.runners.base import EngineOptions
from trtower.runners.tensorrt import TensorRTRunner
from trtower.spec import BatchProfile, TensorSpec

BUILT_BY = "8.6.0"
BATCHES = BatchProfile(min=1, opt=8, max=32)
CUDA_OF_LEAN = 13000
"""What cuDriverGetVersion must return at least. With an older driver the lean runtime ends the process."""
THREADS, CALLS = 8, 100


class HostCodeAllowedRuntime:
    """A lean Runtime that lets the plan bring its own lean runtime, whatever trtower's runner says.

    Its constructor leaves the inner Runtime alone, because touching one that found no driver ends the process.
    """

    def __init__(self, module: ModuleType, log: Any) -> None:
        self._inner = module.Runtime(log)
        self.logger = log

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        """Load a plan, and run the code in it."""
        self._inner.engine_host_code_allowed = True
        return self._inner.deserialize_cuda_engine(plan)


class HostCodeAllowed(ModuleType):
    """Stands in for the lean module: the same names, but its `Runtime` is a HostCodeAllowedRuntime."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        vars(self).update(vars(module))
        self.Runtime = partial(HostCodeAllowedRuntime, module)


@contextmanager
def host_code_allowed(module: ModuleType) -> Iterator[None]:
    """Let trtower find the stand-in for the lean module inside the block."""
    sys.modules[LEAN] = HostCodeAllowed(module)
    try:
        yield
    finally:
        sys.modules[LEAN] = module


class Words(logging.Handler):
    """Collects what TensorRT says, from loggers of ours and from those of trtower's runner."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Receive a message that trtower passed on."""
        self.said.append(record.getMessage())

    def logger(self, module: Any) -> Any:
        """Make a logger for bare calls."""
        said = self.said

        class Log(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: object, message: str) -> None:
                if severity != module.ILogger.VERBOSE:
                    said.append(message)

        return Log()


class Steps:
    """Runs steps one after the other, and writes what each found."""

    def __init__(self, out: pathlib.Path, facts: dict[str, Any]) -> None:
        self.out, self.words = out, Words()
        self.found: dict[str, Any] = {**facts, "steps": {}}
        logging.getLogger("trtower").addHandler(self.words)
        logging.getLogger("trtower").setLevel(logging.DEBUG)

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Run a step; whatever it raises becomes its result."""
        steps, before, start = self.found["steps"], len(self.words.said), time.perf_counter()
        steps[name] = {"result": "the process ended here"}
        self.write()
        try:
            result = work()
        except Exception as err:  # noqa: BLE001 - every refusal is a result
            result = {"refused": f"{type(err).__name__}: {err}", "at": traceback.format_exc().splitlines()[-4:-1]}
        said = self.words.said[before:]
        steps[name] = {"result": result, "seconds": time.perf_counter() - start, "TensorRT says": said}
        self.write()
        print(name, json.dumps(steps[name])[:400], flush=True)

    def write(self) -> None:
        """Write all that was found so far."""
        self.out.write_text(json.dumps(self.found, indent=2) + "\n")


def open_runner(
    path: pathlib.Path, images: torch.Tensor, tokens: torch.Tensor, version: str, *, cuda_graphs: bool
) -> TensorRTRunner:
    """Open a plan with trtower's runner. A stand-in plays the bundle around it, for no export made this plan."""
    manifest = SimpleNamespace(
        input=TensorSpec(name="pixel_values", dtype="float16", shape=("batch", *images.shape[1:])),
        output=TensorSpec(name="hidden_states", dtype="float16", shape=("batch", *tokens.shape[1:])),
        batch=BATCHES,
    )
    bundle: Any = SimpleNamespace(
        path=path.parent, manifest=manifest, read=lambda name: (path.parent / name).read_bytes()
    )
    plan = PlanEntry(
        file=path.name,
        flavour="tensorrt",
        version=version,
        platform=PLATFORM,
        compute_capabilities=("9.0",),
        settings=BuildSettings(version_compatible=True),
    )
    return TensorRTRunner(bundle, plan, torch.device("cuda", 0), EngineOptions(cuda_graphs=cuda_graphs))


class Experiment:
    """The steps, in their order. What one makes, later ones use."""

    def __init__(self, module: ModuleType, path: pathlib.Path, words: Words) -> None:
        answers = torch.load(path.with_name("answers.pt"), weights_only=True)
        self.module, self.path, self.words = module, path, words
        self.images, self.reference = answers["images"].cuda(), answers["fp32"]
        self.engine: Any = None
        self.kept: list[Any] = []
        self.launched: TensorRTRunner | None = None
        self.graphs: TensorRTRunner | None = None

    def empty(self, batch: int) -> torch.Tensor:
        """Allocate hidden states."""
        return torch.empty((batch, *self.reference.shape[1:]), dtype=torch.float16, device="cuda")

    def load(self, allowed: bool) -> dict[str, Any]:
        """Load the plan by bare calls."""
        module: Any = self.module
        said = len(self.words.said)
        runtime = module.Runtime(self.words.logger(module))
        self.kept.append(runtime)
        if any("Error Code" in message for message in self.words.said[said:]):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))  # to free it would end the process
            raise RuntimeError("the lean runtime could not start")
        runtime.engine_host_code_allowed = allowed
        self.engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        engine = self.engine
        if engine is None:
            return {"loaded": False}
        tensors = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return {"loaded": True, "tensors": {name: list(engine.get_tensor_shape(name)) for name in tensors}}

    def bare(self, own_scratch: bool) -> dict[str, Any]:
        """Run all images by bare calls; with ``own_scratch``, in memory of torch, as trtower's runner does."""
        if self.engine is None:
            raise RuntimeError("the plan was not loaded")
        module: Any = self.module
        strategies = module.ExecutionContextAllocationStrategy
        scratch = self.engine.device_memory_size_v2 if own_scratch else 0
        memory = torch.empty(max(scratch, 1), dtype=torch.uint8, device="cuda")
        context = self.engine.create_execution_context(strategies.USER_MANAGED if own_scratch else strategies.STATIC)
        if own_scratch:
            context.set_device_memory(memory.data_ptr(), scratch)
        made, stream = self.empty(len(self.images)), torch.cuda.Stream()
        torch.cuda.synchronize()
        accepted = [
            context.set_input_shape("pixel_values", tuple(self.images.shape)),
            context.set_tensor_address("pixel_values", self.images.data_ptr()),
            context.set_tensor_address("hidden_states", made.data_ptr()),
            context.execute_async_v3(stream.cuda_stream),
        ]
        stream.synchronize()
        return {"accepted": accepted, "scratch_bytes": scratch, **distance(made, self.reference)}

    def open(self, version: str, *, cuda_graphs: bool = False) -> TensorRTRunner:
        """Open the plan with trtower's runner."""
        return open_runner(self.path, self.images, self.reference, version, cuda_graphs=cuda_graphs)

    def open_as_it_is(self, version: str) -> str:
        """Open and close the plan with the unchanged runner."""
        runner = self.open(version)
        runner.close()
        return f"opened: {runner.name}"

    def run_ours(self, cuda_graphs: bool) -> dict[str, Any]:
        """Run batches that the profile names, and one that it does not, with the stand-in."""
        with host_code_allowed(self.module):
            runner = self.open(self.module.__version__, cuda_graphs=cuda_graphs)
        results: dict[str, Any] = {"name": runner.name}
        for batch in (1, 8, 32, 5):
            made = self.empty(batch)
            for _ in range(2):  # the first call may capture, the second replays
                runner.run(self.images[:batch].contiguous(), made)
            torch.cuda.synchronize()
            results[str(batch)] = distance(made, self.reference[:batch])
        if cuda_graphs:
            self.graphs = runner
        else:
            self.launched = runner
        return results

    def race_threads(self) -> dict[str, Any]:
        """Call one runner from many threads, each in a stream of its own."""
        runner = self.graphs
        if runner is None:
            raise RuntimeError("the runner did not open")
        images, expected = self.images[:8].contiguous(), self.empty(8)
        runner.run(images, expected)
        torch.cuda.synchronize()
        unequal: list[float] = []
        done: list[int] = []

        def work() -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(CALLS):
                    made = torch.empty_like(expected)
                    runner.run(images, made)
                    torch.cuda.current_stream().synchronize()
                    done.append(1)
                    if not torch.equal(made, expected):
                        unequal.append((made.float() - expected.float()).abs().max().item())

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"calls": len(done), "unequal": len(unequal), "largest_difference": max(unequal, default=0.0)}

    def race_plan(self) -> dict[str, Any]:
        """Time the plan against PyTorch without compiling, in ms a batch."""
        graphs, launched = self.graphs, self.launched
        if graphs is None or launched is None:
            raise RuntimeError("the runner did not open")
        sdpa = draw_tower("sdpa").half().cuda()
        square = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
        table: dict[str, Any] = {"ceiling_tflops": 2 * 8192**3 / time_ms(lambda: square @ square, 20) / 1e9}
        for batch in (1, 8, 32):
            images, made = self.images[:batch].contiguous(), self.empty(batch)
            table[str(batch)] = {
                "plan, CUDA graph": time_ms(partial(graphs.run, images, made)),
                "plan, launched": time_ms(partial(launched.run, images, made)),
                "sdpa": time_ms(partial(sdpa, images)),
            }
        return table

    def race_compiled(self) -> dict[str, Any]:
        """Time torch.compile, in ms a batch; it takes long to compile, so it comes last."""
        if self.graphs is None:
            raise RuntimeError("the runner did not open, so there is nothing to compare")
        compiled = torch.compile(draw_tower("sdpa").half().cuda(), mode="max-autotune")
        return {str(batch): time_ms(partial(compiled, self.images[:batch].contiguous())) for batch in (1, 8, 32)}


@torch.no_grad()
def time_ms(work: Callable[[], Any], rounds: int = 60) -> float:
    """Return the median time on the GPU, in a stream that is not the default one."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            work()
        for before, after in marks:
            before.record()
            work()
            after.record()
        torch.cuda.synchronize()
    times: list[float] = [before.elapsed_time(after) for before, after in marks]
    return statistics.median(times)


def driver_version() -> int:
    """Ask CUDA's driver for the newest CUDA that it supports, such as 13000; 0 without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def main() -> None:
    """Run all steps."""
    folder, name, out = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
    path = folder / f"{name}.plan"
    if not path.exists():
        sys.exit(f"{path} is missing: the build made no such plan")
    if (driver := driver_version()) < CUDA_OF_LEAN:
        sys.exit(f"the driver supports CUDA {driver}; the lean runtime needs {CUDA_OF_LEAN}, or it ends the process")
    module = load_lean()
    facts = {
        "plan": name,
        "header": path.read_bytes()[:32].hex(" "),  # bytes 24 to 27 are the version that built it
        "tensorrt_lean": module.__version__,
        "torch": torch.__version__,
        "driver": driver,
        "gpu": [torch.cuda.get_device_name(), torch.cuda.get_device_capability()],
    }
    steps = Steps(out, facts)
    torch.zeros(1, device="cuda")
    experiment = Experiment(module, path, steps.words)
    steps.run("bare load, host code refused", partial(experiment.load, allowed=False))
    steps.run("trtower's runner as it is, plan of 8.6.0", partial(experiment.open_as_it_is, BUILT_BY))
    steps.run("trtower's runner as it is, plan of this version", partial(experiment.open_as_it_is, module.__version__))
    steps.run("bare load, host code allowed", partial(experiment.load, allowed=True))
    steps.run("bare calls", partial(experiment.bare, own_scratch=False))
    steps.run("bare calls, scratch memory of torch", partial(experiment.bare, own_scratch=True))
    steps.run("trtower's runner with HostCodeAllowed, launched", partial(experiment.run_ours, cuda_graphs=False))
    steps.run("trtower's runner with HostCodeAllowed, CUDA graphs", partial(experiment.run_ours, cuda_graphs=True))
    steps.run("eight threads", experiment.race_threads)
    steps.run("ms a batch", experiment.race_plan)
    steps.run("ms a batch, torch.compile", experiment.race_compiled)


if __name__ == "__main__":
    main()
