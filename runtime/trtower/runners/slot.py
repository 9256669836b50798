"""Serve one call at a time on the GPU, from a captured CUDA graph where the profiles name the batch."""

import gc
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trtower.errors import BackendError
from trtower.runners.base import OnStart
from trtower.spec import BatchProfile, profile_batches

logger = logging.getLogger(__name__)

Launch = Callable[[torch.Tensor, torch.Tensor, Any], None]
"""Queues one call: its images, the features to fill, and the stream."""


@dataclass(kw_only=True)
class Shared:
    """What the slots of a runner share: whether to capture graphs, and the right to capture, which one has at a time.

    ``captures`` says whether CUDA graphs are captured; it turns False as soon as any capture fails.
    """

    profiles: Sequence[BatchProfile]
    device: torch.device
    captures: bool

    def __post_init__(self) -> None:
        self.turn = threading.Lock()


class Slot(ABC):
    """Serves one call at a time. Its calls follow one another on the GPU, whatever streams they come from.

    ``stream`` is the handle of the stream that last used the slot, or None. ``memory`` is the pool of torch's memory
    that its graphs share, or None for one of each graph's own.
    """

    memory: Any = None

    def __init__(self, shared: Shared) -> None:
        self.stream: int | None = None
        self._shared = shared
        self._to_capture = profile_batches(shared.profiles)
        self._graphs: dict[int, Graph] = {}
        # Work that another thread queues in a stream that captures becomes part of the graph. Torch may hand out a
        # stream twice, but few programs use high-priority ones. cuBLAS has a workspace for each stream, so a slot has a
        # stream of its own: graphs of two slots may run at once.
        self._private: Any = torch.cuda.Stream(shared.device, priority=-1) if shared.captures else None
        # Torch may reuse memory that this stream is still using, which is safe only in this stream. Calls come in other
        # streams, so the first one waits for this event.
        self._last_use = torch.cuda.Event()
        self._last_use.record(torch.cuda.current_stream(shared.device))

    @abstractmethod
    def launch(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> None:
        """Queue a call in ``stream``; raise BackendError if the backend refuses it."""

    @abstractmethod
    def prepare_capture(self, batch: int, stream: Any) -> Launch:
        """Return what queues the calls of one batch that a graph captures. No other call may change what it uses."""

    def enqueue(
        self, images: torch.Tensor, features: torch.Tensor, stream: Any, on_start: OnStart | None = None
    ) -> None:
        """Queue a call in ``stream``, after the slot's previous call; raise BackendError if the backend refuses it."""
        stream.wait_event(self._last_use)
        try:
            if on_start:
                on_start(stream)
            if graph := self._graph_for(images, features, stream):
                graph.replay(images, features, stream)
            else:
                self.launch(images, features, stream)
        finally:
            self._last_use.record(stream)
            self.stream = stream.cuda_stream

    def close(self) -> None:
        """Wait for the last call, then free everything."""
        self._last_use.synchronize()
        self._graphs.clear()

    def _graph_for(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> "Graph | None":
        """Return the graph for this batch size, captured now if it is new; None if the call runs without one."""
        batch, shared = len(images), self._shared
        if shared.captures and batch in self._to_capture and batch not in self._graphs:
            with shared.turn:
                try:
                    if shared.captures:
                        self._graphs[batch] = self._capture_graph(images, features, stream)
                except (RuntimeError, BackendError) as err:  # CUDA, or torch if memory is full, raises RuntimeError
                    shared.captures = False
                    message = "CUDA graphs are off, and calls are launched without them: capturing batch %d failed: %s"
                    logger.warning(message, batch, err)
        return self._graphs.get(batch)

    def _capture_graph(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> "Graph":
        """Capture a call on new tensors, after what is already in ``stream`` and before what enters it next."""
        private = self._private
        # The graph also serves calls outside inference mode, where tensors made inside it could not be written to.
        with torch.inference_mode(mode=False):
            try:
                with torch.cuda.stream(stream):
                    launch = self.prepare_capture(len(images), stream)
                    inputs, outputs = torch.zeros_like(images), torch.empty_like(features)
                    # TensorRT and PyTorch require that the first call with a shape is not captured. PyTorch then finds
                    # no workspace of cuBLAS in the private stream, and takes one from the graph's own memory.
                    launch(inputs, outputs, stream)
                private.wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.stream(private), _no_collection():
                    graph.capture_begin(pool=self.memory, capture_error_mode="thread_local")
                    try:
                        launch(inputs, outputs, private)
                    finally:
                        graph.capture_end()
            except BaseException:
                for each in (stream, private):
                    each.synchronize()  # before what was prepared is freed
                raise
            finally:
                stream.wait_stream(private)
        return Graph(graph, launch, inputs, outputs)


class Graph:
    """A captured call with its own tensors: a graph only reads and writes the addresses that it captured."""

    def __init__(self, graph: Any, launch: Launch, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        self._graph, self._launch, self._inputs, self._outputs = graph, launch, inputs, outputs

    def replay(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> None:
        """Run the call on ``images``, at the cost of two copies on the GPU."""
        with torch.cuda.stream(stream):
            self._inputs.copy_(images)
            self._graph.replay()
            features.copy_(self._outputs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause Python's garbage collection: freeing an object may wait for the GPU, which ends a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
