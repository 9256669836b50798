"""Load a bundle's graph as a PyTorch module that fills a tensor of features, compiled if asked to."""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH_DATA
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BackendError, BundleError, one_line
from trtower.extras import import_extra
from trtower.flavour import sm_name
from trtower.graph import compiling
from trtower.graph.arithmetic import as_typed, multiplies_fp32
from trtower.graph.module import read_module
from trtower.runners.base import Backend, Shape, check_contract
from trtower.runners.device import capability_of
from trtower.runners.kept import DIGITS, Kept
from trtower.runners.processor import hash_flags
from trtower.spec import profile_batches

logger = logging.getLogger(__name__)


def torch_version() -> str:
    """Return PyTorch's name and version, as in "torch 2.13.0"."""
    return f"torch {torch.__version__.partition('+')[0]}"


class LoadedGraph:
    """A graph of a bundle on one device. Threads may share it.

    Raises BundleError if a file was altered or does not match the manifest, and BackendError if PyTorch cannot load it.
    """

    def __init__(self, bundle: Bundle, file: str, backend: Backend, device: torch.device, *, packed: bool) -> None:
        onnx = import_extra("onnx", extra="torch", purpose=backend.name)
        graph, manifest = bundle.read(file), bundle.manifest
        halves = [dtype for dtype in DTYPES.values() if dtype.itemsize == 2]
        self._instead = dict.fromkeys(halves, torch.float32) if backend.arithmetic == "fp32" else {}
        self._bundle, self._file, self._device, self._backend = bundle, file, device, backend.name
        try:
            model = onnx.load_model_from_string(graph)
            _check_locations(bundle, file, model)
            check_contract(bundle, file, _shapes(model.graph.input), _shapes(model.graph.output))
            # From memory, so that the bytes loaded are those that are hashed.
            with bundle.mapped(GRAPH_DATA) as weights:
                rows = manifest.profiles[0].opt * manifest.spec.num_tokens if packed else 0
                self._module = read_module(model, weights, device=device, instead=self._instead, packed=rows)
        except BundleError:
            raise
        except torch.OutOfMemoryError as err:
            raise BackendError(f"{torch_version()} has no memory on {device} for the weights of {bundle.path}") from err
        except Exception as err:
            raise BackendError(f"{torch_version()} could not load {bundle.path / file}: {one_line(err)}") from err
        self._exact_fp32 = multiplies_fp32(self._module)
        self._forward: compiling.Forward = self._module.forward
        self._compiled: dict[int, compiling.Forward] = {}

    def compute(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Fill hidden states, as Runner.run does, in the stream that is current."""
        compiled = self._compiled.get(len(pixel_values))
        if compiled is None:
            with as_typed(self._device.type, exact_fp32=self._exact_fp32):
                hidden_states.copy_(self._forward(self._prepare(pixel_values)))
            return
        # It was compiled for ordinary tensors, and would be compiled again for those of inference mode.
        with torch.inference_mode(mode=False), as_typed(self._device.type, exact_fp32=self._exact_fp32):
            pixels = self._prepare(pixel_values)
            features = compiled(pixels.clone() if pixels.is_inference() else pixels)
        with torch.no_grad():
            hidden_states.copy_(features)

    def _prepare(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.to(self._instead.get(pixel_values.dtype, pixel_values.dtype))

    def compile(self, *, keep: bool) -> None:
        """Compile the batches that the profiles name. ``keep`` keeps the result beside the bundle for other processes.

        Raises BackendError if they cannot be compiled here.
        """
        if obstacle := compiling.why_not(self._device):
            raise BackendError(obstacle)
        kept = self._kept() if keep else None
        try:
            with tempfile.TemporaryDirectory(prefix="trtower-") as name, compiling.compilers_write_to(Path(name)):
                folder = Path(name)
                found = kept is not None and kept.read(lambda content: _unpack(content, folder))
                before = compiling.list_files(folder)
                self._compile_batches(found=found)
                if kept and compiling.list_files(folder) != before:
                    kept.write(compiling.pack(folder))
        except Exception as err:
            raise BackendError(
                f"{torch_version()} could not compile {self._bundle.path}, so load it without compile=True: "
                f"{one_line(err)}"
            ) from err

    def _compile_batches(self, *, found: bool) -> None:
        spec, batches = self._bundle.manifest.input, profile_batches(self._bundle.manifest.profiles)
        dtype = PIXEL_DTYPES[spec.dtype]
        for number, batch in enumerate(batches, start=1):
            if not found:
                message = "compiling %s for batch %d (%d of %d) with torch.compile, which may take minutes"
                logger.warning(message, self._bundle.path, batch, number, len(batches))
            started = time.perf_counter()
            with torch.inference_mode(mode=False), as_typed(self._device.type, exact_fp32=self._exact_fp32):
                images = self._prepare(torch.zeros((batch, *spec.row), dtype=dtype, device=self._device))
                self._compiled[batch] = compiling.compile_for(self._module, images)
            done = "loaded what was compiled for" if found else "compiled"
            logger.info("%s batch %d in %.0f s", done, batch, time.perf_counter() - started)

    def _kept(self) -> Kept:
        if self._device.type == "cuda":
            device = sm_name(capability_of(self._device))
        else:  # the compiler uses all that this processor has, and another would stop at an unknown instruction
            device = f"{hash_flags()[:DIGITS]}-{torch.get_num_threads()}"
        batches = "-".join(map(str, profile_batches(self._bundle.manifest.profiles)))
        return Kept(
            bundle=self._bundle.path,
            kind="compiled",
            source_sha256=self._bundle.manifest.files[self._file].sha256,
            compiler="PyTorch",
            version=torch.__version__,
            device=f"{self._backend}-{device}-{batches}",
            again="the tower is compiled again",
            lost="what was compiled is not saved for the next process",
            alone=True,
        )


def _unpack(content: bytes, folder: Path) -> str | None:
    try:
        compiling.unpack(content, folder)
    except OSError:  # the disk's fault, and not the archive's
        raise
    except Exception as err:  # noqa: BLE001 - zipfile and zlib have their own classes
        return f"it cannot be unpacked ({one_line(err)})"
    return None


def _check_locations(bundle: Bundle, file: str, model: Any) -> None:
    """Refuse a graph that reads weights from any other file."""
    for tensor in model.graph.initializer:
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if places not in ([], [GRAPH_DATA]):
            raise BundleError(
                f"{bundle.path / file} reads weights that are not in {GRAPH_DATA}, so they cannot be verified: export "
                "it again."
            )


def _shapes(values: Any) -> list[tuple[str, Shape]]:
    """Read the names and shapes of a graph's inputs or outputs."""
    return [
        (value.name, tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim))
        for value in values
    ]
