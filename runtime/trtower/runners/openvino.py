"""Run a bundle's graph with OpenVINO on the CPU, in FP32, or in BF16 or 8 bits if the processor supports them.

A graph in half precision rounds every result to it, as a GPU does. On a CPU that only loses accuracy, so here results
stay in FP32 between operations. (`trtower check` also emulates FP16, with every rounding.) In BF16, OpenVINO computes
products in BF16, and chooses by itself which other operations to compute in BF16. In INT8 it computes the quantised
products of an INT8 bundle in 8 bits, and chooses by itself where it rounds to them; the rest is in BF16 if the
processor supports that.
"""

from dataclasses import replace
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH, GRAPH_DATA
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BackendError, BundleError, one_line
from trtower.extras import import_extra
from trtower.runners.base import Backend, EngineOptions, OnStart, Runner, Shape, check_contract
from trtower.runners.pool import Pool
from trtower.runners.processor import has_vnni
from trtower.spec import EIGHT_BIT, PRECISIONS

PRODUCTS = ("Convolution", "MatMul")


class OpenVinoRunner(Runner):
    """One compiled model with as many threads as torch uses. Calls take turns, because each uses all threads."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        ov = import_extra("openvino", extra="openvino", purpose=backend.name)
        in_8_bits = backend.arithmetic in EIGHT_BIT
        others = "fp32" if in_8_bits and not has_bf16(ov) else "bf16" if in_8_bits else backend.arithmetic
        hint = PRECISIONS[others].openvino
        half = PRECISIONS[bundle.manifest.precision].openvino
        core = ov.Core()
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        if bundle.manifest.precision in EIGHT_BIT:
            # In OpenVINO's own 8 bits, on a processor without VNNI, a small tower had 4.5 times the error of PyTorch's
            # simulation; a check allows 3 (OpenVINO 2026.4.1, 2026-11-26).
            settings["LP_TRANSFORMS_MODE"] = in_8_bits
            # OpenVINO would round the inputs of FP32 products again, by groups of 32 numbers.
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        with bundle.steady(GRAPH, numbers=GRAPH_DATA):
            _check_locations(bundle)
            try:
                model = core.read_model(str(bundle.path / GRAPH))
                if half != "f32":
                    model = _widen(ov, model, half, hint)
                check_contract(bundle, GRAPH, _shapes(model.inputs), _shapes(model.outputs))
                self._compiled: Any = core.compile_model(model, "CPU", settings)
            except RuntimeError as err:  # OpenVINO raises it for any failure
                raise BackendError(
                    f"openvino {ov.__version__} could not load {bundle.path / GRAPH}: {one_line(err)}"
                ) from err
        self._requests = Pool(self._compiled.create_infer_request, 1)
        self._ov, self._type = ov, getattr(ov.Type, half)
        self.backend = backend.name
        self.files = (GRAPH, GRAPH_DATA)
        self.device = torch.device("cpu")
        self.dtype = DTYPES[bundle.manifest.output.dtype]
        self.pixel_dtype = PIXEL_DTYPES[bundle.manifest.input.dtype]
        self.name = f"openvino {ov.__version__.partition('-')[0]}, CPU, {backend.arithmetic.upper()}"

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        with self._requests.lend() as request:
            if on_start:
                on_start(None)
            request.set_input_tensor(self._wrap(pixel_values))
            request.set_output_tensor(self._wrap(hidden_states))
            request.infer()

    def close(self) -> None:
        """See Runner.close."""
        self._requests.close()
        self._compiled = None

    def _wrap(self, tensor: torch.Tensor) -> Any:
        """View torch's memory as an OpenVINO tensor. BF16 passes as int16, because numpy has no BF16."""
        cells = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        kind = self._ov.Type.u8 if tensor.dtype == torch.uint8 else self._type
        return self._ov.Tensor(cells.numpy(), self._ov.Shape(list(tensor.shape)), kind)


def has_bf16(ov: Any) -> bool:
    """Return whether OpenVINO can multiply in BF16 on this processor."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _widen(ov: Any, model: Any, half: str, products: str) -> Any:
    """Make a ``model`` in ``half`` compute in FP32 between its input and output, which keep their types.

    Matrix products and convolutions with weights are in ``products``: in FP32, weights would take twice the memory,
    only to be rounded again.
    """
    narrow, operators = getattr(ov.Type, half), ov.opset13
    (pixels,) = model.get_parameters()
    kind = pixels.get_element_type()
    if kind == narrow:
        pixels.set_element_type(ov.Type.f32)
    for node in model.get_ops():
        if node.get_type_name() == "Convert" and node.get_element_type() == narrow:
            node.set_destination_type(ov.Type.f32)
        if node.get_type_name() != "Constant" or node.get_element_type() != narrow:
            continue
        readers = list(node.output(0).get_target_inputs())
        only_products = {reader.get_node().get_type_name() for reader in readers} <= {*PRODUCTS}
        if not only_products or products == "f32":
            _insert(operators.convert(node, "f32"), readers)
        elif products != half:
            _insert(_round(ov, node), readers)
    if products != "f32":
        _keep_products(ov, model, products)
    model.validate_nodes_and_infer_types()
    ends = ov.preprocess.PrePostProcessor(model)
    ends.input().tensor().set_element_type(kind)
    ends.output().tensor().set_element_type(narrow)
    return ends.build()


def _keep_products(ov: Any, model: Any, products: str) -> None:
    """Compute every product with a weight of type ``products`` in that type. Weights in FP32 keep theirs."""
    held = getattr(ov.Type, products)
    for node in model.get_ops():
        sources = [node.input_value(index).get_node() for index in range(node.get_input_size())]
        are_weights = [each.get_type_name() == "Constant" and each.get_element_type() == held for each in sources]
        if node.get_type_name() in PRODUCTS and any(are_weights):
            for index, is_weight in enumerate(are_weights):
                if not is_weight:
                    _insert(ov.opset13.convert(node.input_value(index), products), [node.input(index)])
            readers = list(node.output(0).get_target_inputs())
            node.validate_and_infer_types()
            _insert(ov.opset13.convert(node, "f32"), readers)


def _round(ov: Any, constant: Any) -> Any:
    """Round an FP16 constant to BF16, with all threads; OpenVINO's own conversion of constants takes one."""
    rounded = torch.from_numpy(constant.data.copy()).bfloat16().view(torch.int16)
    return ov.op.Constant(ov.Tensor(rounded.numpy(), ov.Shape(list(rounded.shape)), ov.Type.bf16), shared_memory=False)


def _insert(node: Any, readers: list[Any]) -> None:
    """Connect ``readers`` to the output of ``node``."""
    for reader in readers:
        reader.replace_source_output(node.output(0))


def _check_locations(bundle: Bundle) -> None:
    """Refuse a graph that reads weights from any other file. OpenVINO itself refuses files outside the folder."""
    graph = (bundle.path / GRAPH).read_bytes()
    # Protobuf writes an entry of TensorProto.external_data as key, then value with its length. Any other form did not
    # come from the exporter.
    name = GRAPH_DATA.encode()
    if graph.count(b"location") != graph.count(b"\n\x08location\x12" + bytes([len(name)]) + name):
        raise BundleError(
            f"{bundle.path / GRAPH} reads weights that are not in {GRAPH_DATA}, so they cannot be verified: export it "
            "again."
        )


def _shapes(ports: Any) -> list[tuple[str, Shape]]:
    """Read the names and shapes of a model's inputs or outputs."""
    return [
        (port.get_any_name(), tuple("batch" if size.is_dynamic else size.get_length() for size in port.partial_shape))
        for port in ports
    ]


class OpenVino(Backend):
    """OpenVINO on the CPU, computing in ``arithmetic``."""

    def obstacle(self, bundle: Bundle, file: str, device: torch.device) -> str | None:
        """See Backend.obstacle."""
        if self.arithmetic in EIGHT_BIT and bundle.manifest.precision != self.arithmetic:
            return (
                f"it is for bundles in {self.arithmetic}, and this one is in {bundle.manifest.precision}: export with "
                f"--precision {self.arithmetic}"
            )
        ov = import_extra("openvino", extra="openvino", purpose=self.name)
        if self.arithmetic == "bf16" and not has_bf16(ov):
            return "OpenVINO finds no BF16 support in this processor; use backend openvino"
        if self.arithmetic in EIGHT_BIT and not has_vnni():
            return "this processor has no VNNI, without which OpenVINO's 8 bits are too coarse; use backend openvino"
        return None

    def why_coarse(self, precision: str) -> str | None:
        """See Backend.why_coarse."""
        if self.arithmetic in EIGHT_BIT:
            return "OpenVINO chooses by itself where it rounds to 8 bits"
        return super().why_coarse(precision)

    def open(self, bundle: Bundle, file: str, device: torch.device, engine: EngineOptions) -> Runner:
        """See Backend.open."""
        return OpenVinoRunner(bundle, self)


FP32 = OpenVino(name="openvino", product="OpenVINO", package="openvino", kind="cpu", arithmetic="fp32")
BF16 = replace(FP32, name="openvino-bf16", arithmetic="bf16")
INT8 = replace(FP32, name="openvino-int8", arithmetic="int8")
