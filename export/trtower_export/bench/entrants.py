"""Who races: the bundle, LLaVA's eager tower, and what else could run the cut tower on this device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trtower import VisionTower
from trtower.bundle.bundle import Bundle
from trtower.errors import BackendError
from trtower.flavour import FLAVOURS
from trtower.runners import choose
from trtower.runners.base import Backend
from trtower.spec import PRECISIONS
from trtower_export.bench.environment import multiplies_bf16
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.graph.truncate import TruncatedTower, check_weights, truncate

TRTOWER, LLAVA = "trtower", "llava"

PYTORCH = ("eager", "sdpa", "sdpa-bf16", "compile", "compile-bf16", "cudagraph")
"""The ways in which PyTorch can run the cut tower."""


def competitors() -> tuple[str, ...]:
    """List whom a bundle is raced against besides LLaVA's tower: PyTorch, and its own graph on each backend.

    A backend for the CPU and its counterpart for CUDA are one competitor.
    """
    return (*PYTORCH, *sorted({_competitor(each) for each in choose.BACKENDS if each.name not in FLAVOURS}))


def _competitor(backend: Backend) -> str:
    return backend.name.removesuffix(f"-{backend.kind}")


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """Something that makes features of images. ``backend`` is trtower's name for it, None of PyTorch's."""

    name: str
    runs_on: str
    arithmetic: str
    backend: str | None
    prepare: Callable[[Tensor], Tensor]
    call: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What the entrants are made of: the bundle, loaded (``ran``), and the full model and the cut tower in FP32."""

    bundle: Bundle
    ran: VisionTower | None
    model: nn.Module
    cut: TruncatedTower
    checkpoint: Checkpoint
    device: torch.device

    @classmethod
    def open(cls, bundle: Bundle, checkpoint: Checkpoint, backend: str = "auto") -> "Arena":
        """Load all of it.

        Raises BackendError where the bundle cannot run here, CheckpointError where it is not of these weights.
        """
        ran = VisionTower.load(bundle.path, backend)
        arena = cls.open_torch(bundle, checkpoint, ran.device)
        check_weights(arena.model, bundle.manifest, checkpoint.source)
        return replace(arena, ran=ran)

    @classmethod
    def open_torch(cls, bundle: Bundle, checkpoint: Checkpoint, device: torch.device) -> "Arena":
        """Load what PyTorch runs, and not the bundle."""
        model = checkpoint.load_model(bundle.manifest.spec)
        cut = truncate(model, checkpoint.family, bundle.manifest.spec)
        return cls(bundle=bundle, ran=None, model=model, cut=cut, checkpoint=checkpoint, device=device)

    @property
    def tower(self) -> VisionTower:
        """The bundle, loaded."""
        assert self.ran is not None  # noqa: S101 - only a process that times PyTorch alone is without it
        return self.ran

    @torch.no_grad()
    def reference(self, images: Tensor) -> Tensor:
        """Give the features of the cut tower in FP32, (B, N, D)."""
        features: Tensor = self.cut(images.to(next(self.cut.parameters()).device, torch.float32))
        return self.tokens(features).to(self.device)

    def tokens(self, hidden_states: Tensor) -> Tensor:
        """Keep the tokens that the bundle's feature does: (B, P + N, D) -> (B, N, D)."""
        spec = self.bundle.manifest.spec
        return hidden_states[:, spec.first_token(spec.select_feature) :]

    @property
    def precision(self) -> str:
        """What PyTorch runs in: on a GPU the bundle's dtype, on a CPU FP32: its FP16 takes many times as long."""
        dtype = self.bundle.manifest.input.dtype
        return "fp32" if self.device.type == "cpu" else next(name for name, each in PRECISIONS.items() if each == dtype)


def enter(arena: Arena, name: str) -> Entrant:
    """Make an entrant; raise BackendError saying why it cannot run here."""
    if name == TRTOWER:
        return _enter_bundle(arena, name, arena.tower)
    if name == LLAVA:
        return _enter_torch(arena, name, arena.precision, _llava(arena))
    if name not in PYTORCH:
        named = [each for each in choose.BACKENDS if _competitor(each) == name]
        backend = next((each for each in named if each.kind == arena.device.type), named[0]).name
        runner = arena.tower._runner
        if runner is not None and runner.backend == backend:
            raise BackendError("it is what trtower runs here")
        return _enter_bundle(arena, name, VisionTower.load(arena.bundle.path, backend, arena.device))
    kind, _, suffix = name.partition("-")
    precision = suffix or arena.precision
    if suffix and arena.device.type == "cuda":
        raise BackendError(f"on a GPU all of PyTorch is raced in the bundle's own dtype, {arena.precision}")
    if suffix and not multiplies_bf16():
        raise BackendError("this processor has no BF16 products")
    tower = _cut_in(arena, precision, attention="eager" if kind == "eager" else "sdpa")
    if kind == "compile":
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False  # on a GPU pages of candidates, in which the result is lost
        return _enter_torch(arena, name, precision, torch.compile(tower, mode="max-autotune", dynamic=False))
    if kind == "cudagraph":
        if arena.device.type != "cuda":
            raise BackendError("CUDA graphs need a GPU")
        return _enter_torch(arena, name, precision, _Captured(tower))
    return _enter_torch(arena, name, precision, tower)


def _enter_bundle(arena: Arena, name: str, tower: VisionTower) -> Entrant:
    runner = tower._runner
    assert runner is not None  # noqa: S101 - it was loaded

    def call(images: Tensor) -> Tensor:
        features: Any = tower(images)
        return features  # type: ignore[no-any-return]

    return Entrant(
        name=name,
        runs_on=runner.name,
        arithmetic=choose.find_backend(runner.backend).computes_in(arena.bundle.manifest.precision),
        backend=runner.backend,
        prepare=lambda images: images.to(tower.dtype),
        call=call,
    )


def _enter_torch(arena: Arena, name: str, precision: str, tower: Callable[[Tensor], Tensor]) -> Entrant:
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision])

    @torch.no_grad()
    def call(images: Tensor) -> Tensor:
        return arena.tokens(tower(images))

    return Entrant(
        name=name,
        runs_on=f"PyTorch {torch.__version__}",
        arithmetic=precision,
        backend=None,
        prepare=lambda images: images.to(dtype),
        call=call,
    )


def _llava(arena: Arena) -> Callable[[Tensor], Tensor]:
    """Do what LLaVA's tower does: run every layer, keep every state, read those that are selected."""
    model = _shared(arena, arena.model, arena.precision)
    layers, family = arena.bundle.manifest.spec.layers, arena.checkpoint.family

    def run(images: Tensor) -> Tensor:
        states = family.read_states(model, images)
        return torch.cat([states[layer] for layer in layers], dim=-1)

    return run


def _cut_in(arena: Arena, precision: str, *, attention: str) -> nn.Module:
    model = _shared(arena, arena.model, precision)
    model.config._attn_implementation = attention
    return truncate(model, arena.checkpoint.family, arena.bundle.manifest.spec)


def _shared(arena: Arena, model: nn.Module, precision: str) -> Any:
    """Copy a model in ``precision`` onto the device; where it is that already, it shares its weights with the copy."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[precision])
    if arena.device.type != "cpu" or dtype != next(model.parameters()).dtype:
        return copy.deepcopy(model).to(arena.device, dtype)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class _Captured:
    """PyTorch's own CUDA graphs: one for each batch, with inputs and outputs of its own."""

    def __init__(self, tower: nn.Module) -> None:
        self._tower = tower
        self._graphs: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) not in self._graphs:
            given = images.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._tower(given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                features = self._tower(given)
            self._graphs[len(images)] = (graph, given, features)
        graph, given, features = self._graphs[len(images)]
        given.copy_(images)
        graph.replay()
        return features
