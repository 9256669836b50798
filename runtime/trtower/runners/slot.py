"""What one call of an engine needs on the GPU: scratch memory, contexts that share it, and captured CUDA graphs."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trtower.errors import BackendError
from trtower.runners.base import OnStart
from trtower.spec import BatchProfile, profile_batches

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Shared:
    """What the slots of an engine share: what their contexts are made of, and whether to capture still, and where.

    ``make_context`` returns None if TensorRT has no memory for one. ``names`` are those of the input and the output.

    One call at a time captures, in a stream that nobody else queues into: what another thread queued there meanwhile
    would become part of the graph. After the first capture that fails there is no other.
    """

    make_context: Callable[[], Any]
    scratch_bytes: int
    profiles: Sequence[BatchProfile]
    names: tuple[str, str]
    device: torch.device
    captures: bool

    def __post_init__(self) -> None:
        self.turn = threading.Lock()
        # Few programs take streams of high priority, so that torch has not given this one to another, too.
        self.stream: Any = torch.cuda.Stream(self.device, priority=-1) if self.captures else None


class Slot:
    """Serves one call at a time. Its calls follow one another on the GPU, whatever streams they come in.

    Every profile has a context of its own, and so has every graph: what a graph has captured, no other call changes.
    They share one piece of scratch memory, because no two of them run at once. It is torch's, which gives from its
    cache what a program has freed. ``stream`` is the handle of the stream that used it last, None before any did.
    Raises BackendError where there is no room for all of that.
    """

    def __init__(self, shared: Shared) -> None:
        self.stream: int | None = None
        self._shared = shared
        self._to_capture = profile_batches(shared.profiles)
        try:
            self._scratch = allocate(shared.scratch_bytes, shared.device)
        except torch.OutOfMemoryError as err:
            raise BackendError(
                f"no room for an execution context on {shared.device}: it needs {shared.scratch_bytes} bytes of GPU "
                "memory."
            ) from err
        here = torch.cuda.current_stream(shared.device)
        self._graphs: dict[int, Graph] = {}
        self._contexts = [self._new_context(index, here.cuda_stream) for index in range(len(shared.profiles))]
        # Torch gives memory that this stream may still be using to this stream alone; calls come in others.
        self._last_use = torch.cuda.Event()
        self._last_use.record(here)

    def enqueue(
        self, images: torch.Tensor, features: torch.Tensor, stream: Any, on_start: OnStart | None = None
    ) -> None:
        """Queue a call in ``stream``, after the slot's call before. Raises BackendError where TensorRT refuses."""
        stream.wait_event(self._last_use)
        try:
            if on_start:
                on_start(stream)
            if graph := self._graph_for(images, features, stream):
                graph.replay(images, features, stream)
            else:
                self._launch(self._contexts[self._profile_for(len(images))], images, features, stream.cuda_stream)
        finally:
            self._last_use.record(stream)
            self.stream = stream.cuda_stream

    def close(self) -> None:
        """Wait for the last call, and let go of everything."""
        self._last_use.synchronize()
        self._graphs.clear()
        self._contexts.clear()
        del self._scratch

    def _graph_for(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> "Graph | None":
        """Give the graph of this batch, captured now if it is the first; None where it is to be launched plainly."""
        batch, shared = len(images), self._shared
        if shared.captures and batch in self._to_capture and batch not in self._graphs:
            with shared.turn:
                try:
                    if shared.captures:
                        self._graphs[batch] = self._capture_graph(images, features, stream)
                except (RuntimeError, BackendError) as err:  # RuntimeError is CUDA's, and torch's where memory is full
                    shared.captures = False
                    said = "CUDA graphs are left out from now on, and calls are launched: batch %d: %s"
                    logger.warning(said, batch, err)
        return self._graphs.get(batch)

    def _capture_graph(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> "Graph":
        """Capture a call on tensors of its own, after what ``stream`` holds and before what it is given next."""
        private = self._shared.stream
        # Inference mode would bind the tensors to it, and the graph serves calls outside of it, too.
        with torch.cuda.stream(private), torch.inference_mode(mode=False):
            private.wait_stream(stream)
            try:
                context = self._new_context(self._profile_for(len(images)), private.cuda_stream)
                inputs, outputs = torch.zeros_like(images), torch.empty_like(features)
                # TensorRT wants a shape's first one uncaptured.
                self._launch(context, inputs, outputs, private.cuda_stream)
                graph = torch.cuda.CUDAGraph()
                with _no_collection():
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        self._launch(context, inputs, outputs, private.cuda_stream)
                    finally:
                        graph.capture_end()
            except BaseException:
                private.synchronize()  # before the context goes
                raise
            finally:
                stream.wait_stream(private)
        return Graph(graph, context, inputs, outputs)

    def _profile_for(self, batch: int) -> int:
        """Choose the profile that was tuned nearest to a batch, and of two such the narrower."""
        profiles = self._shared.profiles
        fitting = [
            (abs(each.opt - batch), each.max - each.min, index)
            for index, each in enumerate(profiles)
            if each.min <= batch <= each.max
        ]
        if not fitting:
            raise BackendError(f"no profile of the plan takes {batch} images: {profiles} are there.")
        return min(fitting)[-1]

    def _new_context(self, profile: int, stream: int) -> Any:
        shared = self._shared
        context = shared.make_context()
        if context is None:
            raise BackendError(
                f"no execution context on {shared.device}, for want of GPU memory beside {shared.scratch_bytes} bytes "
                "of scratch; TensorRT's reason is in the log."
            )
        context.set_device_memory(self._scratch.data_ptr(), shared.scratch_bytes)
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"profile {profile} of the plan could not be set; TensorRT's reason is in the log.")
        return context

    def _launch(self, context: Any, images: torch.Tensor, features: torch.Tensor, stream: int) -> None:
        inputs, outputs = self._shared.names
        accepted = (
            context.set_input_shape(inputs, tuple(images.shape))
            and context.set_tensor_address(inputs, images.data_ptr())
            and context.set_tensor_address(outputs, features.data_ptr())
            and context.execute_async_v3(stream)
        )
        if not accepted:
            raise BackendError(f"TensorRT could not run {tuple(images.shape)}; its reason is in the log.")


class Graph:
    """A captured call, with tensors of its own: it reads and writes no address that it was not captured with."""

    def __init__(self, graph: Any, context: Any, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        self._graph, self._context, self._inputs, self._outputs = graph, context, inputs, outputs

    def replay(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> None:
        """Run it on ``images``; two copies on the GPU are what it costs."""
        with torch.cuda.stream(stream):
            self._inputs.copy_(images)
            self._graph.replay()
            features.copy_(self._outputs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Have Python collect no garbage: what goes with it may wait for the GPU, which ends a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """Take bytes of a GPU's memory, at an address that TensorRT's alignment is content with."""
    return torch.empty(max(size, 1), dtype=torch.uint8, device=device)
