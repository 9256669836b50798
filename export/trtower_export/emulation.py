"""Run a BF16 graph where no kernel for it exists, so that it can be checked without a GPU.

ONNX Runtime has no BF16 kernels for the CPU, so every operation is computed in FP32 and its result rounded to
BF16, which is what a GPU that accumulates in FP32 does. The emulation says so in its name, serves `trtower check`
alone, and is never chosen to serve a tower.
"""

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from trtower.bundle import GRAPH, GRAPH_DATA, Bundle
from trtower.errors import ConfigError
from trtower.extras import import_extra

EMULATED_BF16 = "emulated-bf16"
"""The name by which `trtower check --backend` knows it."""


def open_emulated(bundle: Bundle) -> "EmulatedBf16Runner":
    """Open a BF16 bundle's graph in emulation."""
    if bundle.manifest.precision != "bf16":
        raise ConfigError(f"--backend {EMULATED_BF16} is for bf16; {bundle.path} is {bundle.manifest.precision}.")
    return EmulatedBf16Runner(bundle)


class EmulatedBf16Runner:
    """A Runner on the CPU, in FP32 between roundings."""

    def __init__(self, bundle: Bundle) -> None:
        ort = import_extra("onnxruntime", extra="cpu", purpose="emulating BF16")
        bundle.verify(GRAPH_DATA)
        model = onnx.load_model(bundle.verify(GRAPH))
        round_to_bf16(model.graph)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.files = (GRAPH, GRAPH_DATA)
        self.device = torch.device("cpu")
        self.dtype = torch.bfloat16
        self.name = f"onnxruntime {ort.__version__}, CPU, BF16 emulated"

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """See Runner.run."""
        (found,) = self._session.run(None, {self._session.get_inputs()[0].name: pixel_values.float().numpy()})
        hidden_states.copy_(torch.from_numpy(found))


def round_to_bf16(graph: onnx.GraphProto) -> None:
    """Turn a BF16 graph into an FP32 one, in place, that rounds to BF16 after every node."""
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype("float32")
            graph.initializer[index].CopyFrom(numpy_helper.from_array(values, tensor.name))
    integers = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT64}
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        roundings = []
        if node.op_type == "Shape" or all(name in integers for name in node.input):
            integers.update(node.output)
        else:
            for index, name in enumerate(node.output):
                exact, rounded = f"{name}.exact", f"{name}.rounded"
                node.output[index] = exact
                roundings.append(helper.make_node("Cast", [exact], [rounded], to=TensorProto.BFLOAT16))
                roundings.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
        graph.node.extend([node, *roundings])
