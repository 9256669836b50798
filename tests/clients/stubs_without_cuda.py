"""Stand-ins for what VILA and tinychat import and a machine without a GPU cannot have.

Nothing here computes anything but two kernels, which `stub_tinychat_kernels` writes in PyTorch.
Only what is named here is replaced, and only where it is not installed. What a client's modules do with it when they
are imported goes through: a name, a base class, a decorator. Nothing in the place of a tensor would.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
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
"""VILA's parts that are nothing but GPU kernels, or a tower from a package of its own."""


_done: list[str] = []
_imported: set[str] = set()
_libraries: list[Any] = []


def describe() -> list[str]:
    """Say what was replaced: of the packages, those that the client has imported by now."""
    told = {**PACKAGES, **dict.fromkeys(CLIENT_MODULES, "a module of the client")}
    return [f"{name} ({why})" for name, why in told.items() if name in _imported] + _done


class _Absent:
    """Anything that is imported from an absent package: it may be subclassed, called, and decorate."""

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
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Finder:
    """Finds the absent packages and everything below them."""

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
        """A stand-in has nothing to run."""


def stub_packages() -> None:
    """Put a stand-in in the place of each package that is not installed, and of the client's own modules."""
    import transformers.modeling_utils  # noqa: F401 - it asks which packages are installed: before the stand-ins are

    absent = {name for name in PACKAGES if importlib.util.find_spec(name) is None}
    sys.meta_path.insert(0, _Finder({*absent, *CLIENT_MODULES}))


def stub_torchvision() -> None:
    """Declare the compiled operators that torchvision wants at import, where its library is for a torch with CUDA."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    _done.append("torchvision's compiled operators (none is called)")


def stub_flash_attention() -> None:
    """Have a model of transformers that asks for flash attention compute it in PyTorch."""
    from transformers import PreTrainedModel

    def take_sdpa(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        config._attn_implementation = "sdpa"
        return config

    PreTrainedModel._check_and_enable_flash_attn_2 = classmethod(take_sdpa)
    _done.append("attn_implementation='flash_attention_2' (sdpa in its place)")


def stub_cuda() -> None:
    """Have `.cuda()` return a tensor or module as it is."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    _done.append(".cuda() (stays on the CPU)")


def stub_for_vila() -> None:
    """Stub what VILA's code wants."""
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
        parts = (part.transpose(1, 2) for part in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)
        return attended.transpose(1, 2)

    awq_inference_engine.layernorm_forward_cuda = layernorm_forward_cuda
    flash_attn.flash_attn_func = flash_attn_func
    _done.append("awq_inference_engine.layernorm_forward_cuda and flash_attn.flash_attn_func (computed in PyTorch)")


def stub_tinychat_rotary(module: ModuleType) -> None:
    """Leave out a module that a file of tinychat's makes on the GPU, and calls a dummy."""
    module.LlamaRotaryEmbedding = lambda *args, **kwargs: torch.nn.Identity()
    _done.append(f"{module.__name__}.LlamaRotaryEmbedding (made and never called)")
