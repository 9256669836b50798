"""Fakes of TensorRT and of torch's CUDA streams, for test machines without a GPU.

A fake engine does not compute a tower: it fills the tokens of an image with the image's own pixels (`fake_answer`).
Otherwise it behaves like the hardware. It reads and writes memory at the addresses it gets. Work waits in its stream
until the stream is synchronised. A context serves one call at a time, and refuses a shape outside the profile by
returning False. What the hardware leaves undefined raises an AssertionError here.

test_tensorrt_runner.py compares every public name and parameter of the fake module with the real tensorrt_rtx.
"""

import ctypes
import enum
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

FAKE_VERSION = "99.0.fake"
FAKE_CAPABILITY = (8, 9)
FAKE_DEVICE_MEMORY = 123456789
FAKE_PLAN_MAGIC = b"fake plan\n"


def fake_answer(image: np.ndarray[Any, Any], tokens: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Repeat an image's pixels until they fill its tokens: (3, S, S) -> (P + N, D)."""
    return np.resize(image, tokens)


class FakeStream:
    """A queue of work, which runs in order, but only when something synchronises."""

    def __init__(self, cuda: "FakeCuda", handle: int) -> None:
        self.cuda_stream = handle
        self._cuda = cuda
        self._work: deque[Callable[[], object]] = deque()

    def submit(self, work: Callable[[], object]) -> None:
        graph = self._cuda.capturing.get(self.cuda_stream)
        if graph:
            assert graph.thread == threading.get_ident(), "another call's work became part of a graph"
            graph.work.append(work)
        else:
            self._work.append(work)

    def wait_event(self, event: "FakeEvent") -> None:
        # As in CUDA, a later record() does not change what is waited for, and an unrecorded event causes no wait.
        if marker := event.marker:
            self.submit(marker.reach)

    def wait_stream(self, stream: "FakeStream") -> None:
        capturing = self._cuda.capturing.keys() & {self.cuda_stream, stream.cuda_stream}
        assert not capturing, "a capture must not depend on work queued outside it"
        self.submit(FakeMarker(stream).reach)

    def synchronize(self) -> None:
        with self._cuda.gpu:
            while self._work:
                self.step()

    def step(self) -> None:
        self._work.popleft()()


class FakeMarker:
    """One recording of an event in a stream."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream
        self.reached = False
        stream.submit(self.mark)

    def mark(self) -> None:
        self.reached = True

    def reach(self) -> None:
        while not self.reached:
            self.stream.step()


class FakeEvent:
    """The part of torch.cuda.Event that the runner uses."""

    def __init__(self) -> None:
        self.marker: FakeMarker | None = None

    def record(self, stream: FakeStream) -> None:
        self.marker = FakeMarker(stream)

    def synchronize(self) -> None:
        if self.marker:
            self.marker.reach()


class FakeGraph:
    """torch.cuda.CUDAGraph: the work queued in the stream between begin and end, which every replay runs again.

    Torch's copies around a replay happen at once, not in their stream, because the tensors are on the host.
    """

    fails = False
    lasts_s = 0.0

    def __init__(self, cuda: "FakeCuda") -> None:
        self._cuda = cuda
        self.work: list[Callable[[], object]] = []
        self.replays = 0
        self.thread = 0

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.pool = pool
        assert capture_error_mode == "thread_local", "another thread's CUDA calls would end the capture"
        stream = self._cuda.current_stream().cuda_stream
        assert stream, "the default stream cannot be captured"
        assert stream not in self._cuda.capturing, "two captures in one stream"
        self.thread = threading.get_ident()
        self._cuda.capturing[stream] = self
        time.sleep(FakeGraph.lasts_s)

    def capture_end(self) -> None:
        time.sleep(FakeGraph.lasts_s)
        del self._cuda.capturing[self._cuda.current_stream().cuda_stream]
        if FakeGraph.fails:
            raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")
        assert self.work, "nothing was captured"

    def replay(self) -> None:
        self._cuda.current_stream().synchronize()
        for work in self.work:
            work()
        self.replays += 1


class FakeCuda:
    """The part of torch.cuda that the runner uses. ``finished`` lists the stream of each finished call, in order."""

    def __init__(self) -> None:
        self.gpu = threading.RLock()
        self.finished: list[FakeStream] = []
        self.capturing: dict[int, FakeGraph] = {}
        self._streams: dict[int, FakeStream] = {}
        self._default = self.new_stream()
        self._here = threading.local()
        self.graphs: list[FakeGraph] = []
        self.held: list[object] = []

    def new_graph(self) -> FakeGraph:
        self.graphs.append(FakeGraph(self))
        return self.graphs[-1]

    def new_stream(self, device: torch.device | None = None, priority: int = 0) -> FakeStream:
        del device, priority
        stream = FakeStream(self, handle=len(self._streams))
        self._streams[stream.cuda_stream] = stream
        return stream

    def find_stream(self, handle: int) -> FakeStream:
        assert handle in self._streams, f"no stream has the handle {handle}"
        return self._streams[handle]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream()
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        del device  # all streams of the fake are on one device
        stream: FakeStream = getattr(self._here, "stream", self._default)
        return stream

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current_device()
        self._here.device = device
        try:
            yield
        finally:
            self._here.device = before

    def graph_pool_handle(self) -> object:
        return object()

    def current_device(self) -> torch.device:
        device: torch.device = getattr(self._here, "device", torch.device("cuda", 0))
        return device

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        del device
        return FAKE_CAPABILITY

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


def fake_plan(
    input_: tuple[str, tuple[int | str, ...]],
    output: tuple[str, tuple[int | str, ...]],
    profiles: tuple[tuple[int, int, int], ...],
    *,
    says: tuple[str, ...] = (),
    contexts: int = 1000,
) -> bytes:
    """Serialise a fake engine: name and shape of an image and of its tokens, both 16-bit, and its batch profiles.

    ``says`` lists the severities at which TensorRT logs a line while it loads the plan. ``contexts`` is the number of
    contexts that fit in memory.
    """
    fields = {"input": input_, "output": output, "profiles": profiles, "says": says, "contexts": contexts}
    return FAKE_PLAN_MAGIC + json.dumps(fields).encode()


ABSENT = {
    "tensorrt_rtx": (),
    "tensorrt": ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeCache", "IRuntimeConfig"),
}
ABSENT["tensorrt_lean"] = (*ABSENT["tensorrt"], "OnnxParserRefitter")
"""What the real modules lack of those that the fake can be; and IRuntimeConfig, of which theirs has less."""


class FakeTensorRT(ModuleType):
    """A fake of one of TensorRT's modules. Names that start with _fake_ are for tests; the real module has all others.

    What is done with a fake is recorded in it, or in ``recorder``, another fake. ``_fake_driver_is_old`` may be "null"
    or "crash": what the full and the lean TensorRT make of a driver that is too old.
    """

    def __init__(self, cuda: FakeCuda, name: str = "tensorrt_rtx", recorder: "FakeTensorRT | None" = None) -> None:
        super().__init__(name)
        self.__version__ = FAKE_VERSION
        self._fake_cuda = cuda
        self._fake_deserialized: list[bytes] = []
        self._fake_devices: list[torch.device] = []
        self._fake_enqueue_fails = False
        self._fake_contexts: list[Any] = []
        self._fake_configs: list[Any] = []
        self._fake_ran: list[tuple[Any, int, int]] = []
        self._fake_driver = b"fake driver 1"
        self._fake_refitted: list[str] = []
        self._fake_refits = True
        self._fake_takes_cache = True
        self._fake_driver_is_old = ""
        self._fake_destroyed: list[Any] = []
        fake = recorder or self

        class ILogger:
            class Severity(enum.IntEnum):
                INTERNAL_ERROR = 0
                ERROR = 1
                WARNING = 2
                INFO = 3
                VERBOSE = 4

            INTERNAL_ERROR = Severity.INTERNAL_ERROR
            ERROR = Severity.ERROR
            WARNING = Severity.WARNING
            INFO = Severity.INFO
            VERBOSE = Severity.VERBOSE

            def __init__(self) -> None:
                self._fake_initialised = True

            def log(self, severity: object, msg: str) -> None:
                raise NotImplementedError

        class IExecutionContext:
            def __init__(self, logger: ILogger, fields: dict[str, Any]) -> None:
                self._fake_logger = logger
                self._fake_input, self._fake_output = fields["input"], fields["output"]
                self._fake_profiles, self._fake_profile = fields["profiles"], 0
                self._fake_memory = 0
                self._fake_shape: tuple[int, ...] | None = None
                self._fake_addresses: dict[str, int] = {}
                self._fake_caller: int | None = None

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                here = threading.get_ident()
                assert self._fake_caller in (None, here), "two calls overlap on one context"
                self._fake_caller = here
                image_name, image = self._fake_input
                least, _, most = self._fake_profiles[self._fake_profile]
                if name != image_name or list(shape[1:]) != image or not least <= shape[0] <= most:
                    # The real context then keeps the shape of the previous call.
                    self._fake_logger.log(ILogger.ERROR, f"{shape} does not satisfy any optimization profiles")
                    return False
                self._fake_shape = tuple(shape)
                return True

            def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
                cuda.find_stream(stream_handle)
                self._fake_profile = profile_index
                return profile_index < len(self._fake_profiles)

            def set_device_memory(self, memory: int, size: int) -> None:
                assert size >= FAKE_DEVICE_MEMORY, "TensorRT needs more scratch memory than that"
                self._fake_memory = memory

            def set_tensor_address(self, name: str, memory: int) -> bool:
                self._fake_check_caller()
                if name not in (self._fake_input[0], self._fake_output[0]):
                    return False
                self._fake_addresses[name] = memory
                time.sleep(1e-4)  # lets another thread in, unless a lock keeps it out
                return True

            def execute_async_v3(self, stream_handle: int) -> bool:
                self._fake_check_caller()
                self._fake_caller = None
                if fake._fake_enqueue_fails:
                    self._fake_logger.log(ILogger.ERROR, "fake failure of an enqueue")
                    return False
                assert self._fake_shape is not None, "no input shape was set"
                assert self._fake_memory, "a context without its own memory was not assigned any"
                shape, self._fake_shape = self._fake_shape, None
                assert len(self._fake_addresses) == 2, f"addresses are set only for {list(self._fake_addresses)}"
                stream = cuda.find_stream(stream_handle)
                fake._fake_devices.append(cuda.current_device())
                source, target = (self._fake_addresses[name] for name in (self._fake_input[0], self._fake_output[0]))
                tokens = tuple(self._fake_output[1])

                def work() -> None:
                    images = _memory(source, shape)
                    hidden_states = _memory(target, (shape[0], *tokens))
                    for row, image in zip(hidden_states, images, strict=True):
                        row[:] = fake_answer(image, tokens)
                    cuda.finished.append(stream)
                    fake._fake_ran.append((self, self._fake_profile, shape[0]))

                stream.submit(work)
                return True

            def _fake_check_caller(self) -> None:
                assert self._fake_caller == threading.get_ident(), "two calls overlap on one context"

        class ExecutionContextAllocationStrategy(enum.IntEnum):
            STATIC = 0
            ON_PROFILE_CHANGE = 1
            USER_MANAGED = 2

        class CudaGraphStrategy(enum.IntEnum):
            DISABLED = 0
            WHOLE_GRAPH_CAPTURE = 1

        class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
            LAZY = 0
            EAGER = 1
            NONE = 2

        class IRuntimeCache:
            def __init__(self) -> None:
                self._fake_kernels = b""

            def deserialize(self, blob: bytes) -> bool:
                if not blob.startswith(fake._fake_driver):
                    return False
                self._fake_kernels = blob
                return True

            def serialize(self) -> bytes:
                return self._fake_kernels or fake._fake_driver + b" compiled here"

        class IRuntimeConfig:
            def __init__(self) -> None:
                assert name == "tensorrt_rtx", "data-centre TensorRT has no cache and no strategies at run time"
                self._fake_strategy: object = ExecutionContextAllocationStrategy.STATIC
                self._fake_cache: IRuntimeCache | None = None
                self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
                self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

            def set_execution_context_allocation_strategy(self, strategy: object) -> None:
                self._fake_strategy = strategy

            def create_runtime_cache(self) -> IRuntimeCache:
                return IRuntimeCache()

            def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
                self._fake_cache = cache
                return fake._fake_takes_cache

        class ICudaEngine:
            device_memory_size_v2 = FAKE_DEVICE_MEMORY

            def __init__(self, logger: ILogger, fields: dict[str, Any]) -> None:
                self._fake_logger, self._fake_fields = logger, fields

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                shapes = dict([self._fake_fields["input"], self._fake_fields["output"]])
                return (-1, *shapes[name])

            def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
                image = dict([self._fake_fields["input"]])[name]
                return [(batch, *image) for batch in self._fake_fields["profiles"][profile_index]]

            @property
            def num_optimization_profiles(self) -> int:
                return len(self._fake_fields["profiles"])

            def create_runtime_config(self) -> IRuntimeConfig:
                fake._fake_configs.append(IRuntimeConfig())
                return fake._fake_configs[-1]

            def create_execution_context(self, strategy: object) -> IExecutionContext | None:
                if isinstance(strategy, IRuntimeConfig):
                    strategy = strategy._fake_strategy
                assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
                fake._fake_devices.append(cuda.current_device())
                if len(fake._fake_contexts) >= self._fake_fields["contexts"]:
                    self._fake_logger.log(ILogger.ERROR, "fake lack of memory")
                    return None
                fake._fake_contexts.append(IExecutionContext(self._fake_logger, self._fake_fields))
                return fake._fake_contexts[-1]

        class Refitter:
            def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
                assert isinstance(logger, ILogger)
                self._fake_engine = engine

            def refit_cuda_engine(self) -> bool:
                return bool(fake._fake_refitted)

        class OnnxParserRefitter:
            def __init__(self, refitter: Refitter, logger: ILogger) -> None:
                assert isinstance(logger, ILogger)
                self._fake_refitter = refitter

            @property
            def num_errors(self) -> int:
                return 0 if fake._fake_refits else 1

            def get_error(self, index: int) -> Any:
                return SimpleNamespace(desc=lambda: f"fake refusal {index} of weights")

            def refit_from_file(self, model: str) -> bool:
                fake._fake_refitted.append(model)
                return fake._fake_refits

        class Runtime:
            engine_host_code_allowed = True  # False in reality; here, the runner must say so

            def __init__(self, logger: ILogger) -> None:
                if fake._fake_driver_is_old == "null":
                    raise TypeError("pybind11::init(): factory function returned nullptr")
                assert isinstance(logger, ILogger), f"{logger!r} is not an ILogger"
                assert getattr(logger, "_fake_initialised", False), "ILogger.__init__ was not called"
                self._fake_logger = self.logger = logger
                if fake._fake_driver_is_old:
                    logger.log(ILogger.ERROR, "CUDA initialization failure with error: 35")

            def __del__(self) -> None:
                if fake._fake_driver_is_old == "crash":
                    fake._fake_destroyed.append(self)

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
                assert not self.engine_host_code_allowed, "a plan could run code of its author"
                assert not fake._fake_driver_is_old, "the process would have ended here"
                fake._fake_deserialized.append(serialized_engine)
                fake._fake_devices.append(cuda.current_device())
                if not serialized_engine.startswith(FAKE_PLAN_MAGIC):
                    self._fake_logger.log(ILogger.ERROR, "fake refusal of a plan")
                    return None
                fields = json.loads(serialized_engine.removeprefix(FAKE_PLAN_MAGIC))
                for severity in fields["says"]:
                    self._fake_logger.log(ILogger.Severity[severity], f"fake line at {severity}")
                return ICudaEngine(self._fake_logger, fields)

        if name != "tensorrt_rtx":  # 10.3 lacks it, and only TensorRT-RTX needs it
            del ICudaEngine.create_runtime_config
        for each in (
            ILogger,
            IExecutionContext,
            ICudaEngine,
            IRuntimeConfig,
            IRuntimeCache,
            OnnxParserRefitter,
            Refitter,
            Runtime,
            ExecutionContextAllocationStrategy,
            CudaGraphStrategy,
            DynamicShapesKernelSpecializationStrategy,
        ):
            if each.__name__ not in ABSENT[name]:
                setattr(self, each.__name__, each)


def _memory(address: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """View the 16-bit numbers at an address as an array."""
    cells = (ctypes.c_uint16 * int(np.prod(shape))).from_address(address)
    return np.ctypeslib.as_array(cells).reshape(shape)
