"""Stubs for packages that VILA and tinychat import but that need a GPU.

Only the packages named here are replaced, and only if they are not installed. A stub can be imported, subclassed and
used as a decorator, which is all that a client's modules do at import. It cannot replace a tensor. Nothing here
computes anything, except two kernels that `stub_tinychat_kernels` implements in PyTorch.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import MutableSequence
from types import ModuleType
from typing import Any

import torch

PACKAGES = {
    "awq_inference_engine": "tinychat's own CUDA kernels",
    "datasets": "data sets of training",
    "decord": "video files",
    "deepspeed": "training",
    "flash_attn": "attention on a GPU",
    "ring_flash_attn": "attention over several GPUs",
    "xgrammar": "constrained decoding",
    "wandb": "logs of training",
}

CLIENT_MODULES = (
    "llava.model.language_model.fp8linearqwen2",
    "llava.model.language_model.qllava_qllama",
    "llava.model.multimodal_encoder.ps3_encoder",
)
"""Parts of VILA that are only GPU kernels, or a tower from a separate package."""


_done: list[str] = []
_imported: set[str] = set()
_libraries: list[Any] = []


def describe() -> list[str]:
    """List what was replaced; of the packages, only those that the client has imported so far."""
    reasons = {**PACKAGES, **dict.fromkeys(CLIENT_MODULES, "a module of the client")}
    return [f"{name} ({why})" for name, why in reasons.items() if name in _imported] + _done


class _Absent:
    """Anything imported from an absent package. It can be subclassed, called and used as a decorator."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if decorates else _Absent(f"{self.name}(…)")

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.name}.{name}")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _AbsentModule(ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012 - the type that ModuleType gives it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent packages and everything inside them."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not any(f"{name}.".startswith(f"{absent}.") for absent in self.names):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        _imported.update(name for name in self.names if f"{spec.name}.".startswith(f"{name}."))
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stub has no code."""


def stub_packages() -> None:
    """Install a stub for each package that is not installed, and for the client modules."""
    import transformers.modeling_utils  # noqa: F401 - it checks which packages are installed, so import it before the stubs

    absent = {name for name in PACKAGES if importlib.util.find_spec(name) is None}
    sys.meta_path.insert(0, _Finder({*absent, *CLIENT_MODULES}))


def stub_torchvision() -> None:
    """Declare the compiled operators that torchvision needs at import, in case its library is built for CUDA."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    _done.append("torchvision's compiled operators (none is called)")


def stub_flash_attention() -> None:
    """Make transformers models that request flash attention compute it in PyTorch."""
    from transformers import PreTrainedModel

    def take_sdpa(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        config._attn_implementation = "sdpa"
        return config

    PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(take_sdpa)  # type: ignore[attr-defined] # not in 5
    _done.append("attn_implementation='flash_attention_2' (sdpa in its place)")


def stub_cuda() -> None:
    """Make `.cuda()` return a tensor or module unchanged."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    _done.append(".cuda() (stays on the CPU)")


def stub_for_vila() -> None:
    """Stub everything that VILA's code needs."""
    stub_torchvision()
    stub_packages()
    stub_flash_attention()
    stub_cuda()


def stub_tinychat_kernels() -> None:
    """Compute in PyTorch the two kernels that tinychat's language models need to read a prompt."""
    import awq_inference_engine
    import flash_attn

    def layernorm_forward_cuda(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float) -> None:
        out.copy_(torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps))

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return attended.transpose(1, 2)

    awq_inference_engine.layernorm_forward_cuda = layernorm_forward_cuda
    flash_attn.flash_attn_func = flash_attn_func
    _done.append("awq_inference_engine.layernorm_forward_cuda and flash_attn.flash_attn_func (computed in PyTorch)")


def stub_tinychat_rotary(module: Any) -> None:
    """Leave out a rotary module that tinychat creates on the GPU but never calls."""
    module.LlamaRotaryEmbedding = lambda *args, **kwargs: torch.nn.Identity()
    _done.append(f"{module.__name__}.LlamaRotaryEmbedding (made and never called)")
