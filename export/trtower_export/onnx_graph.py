"""Trace a truncated tower to ONNX, with a dynamic batch and the precision written into the graph."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir
import torch
from torch import nn

from trtower.bundle import GRAPH_DATA
from trtower.errors import BuildError
from trtower.spec import BatchProfile, TensorSpec

OPSETS = {"float16": 23, "bfloat16": 23, "float32": 20}
"""Opset 23 gives one Attention node a layer, which TensorRT-RTX 1.7 has kernels for only in half precision."""

INPUT_DTYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
}


def write_onnx(tower: nn.Module, input_: TensorSpec, output: TensorSpec, batch: BatchProfile, path: Path) -> None:
    """Cast ``tower`` in place to the input's dtype, trace it, and write ``path`` with its weights beside it.

    The same weights give the same bytes: names of source files, which PyTorch writes into every node, are
    taken out. Raises BuildError where the graph is not what ``input_`` and ``output`` promise.
    """
    dtype: torch.dtype = getattr(torch, input_.dtype)
    example = torch.zeros((2, *(int(size) for size in input_.shape[1:])), dtype=dtype)
    # A batch of exactly 1 would be a constant to torch.export, so the dimension reaches to 2 at least.
    dynamic_shapes = {input_.name: {0: torch.export.Dim("batch", min=1, max=max(batch.max, 2))}}
    with _quiet_exporter():
        program = torch.onnx.export(
            tower.to(dtype),
            (example,),
            dynamo=True,
            opset_version=OPSETS[input_.dtype],
            input_names=[input_.name],
            output_names=[output.name],
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
        assert program is not None  # noqa: S101 - dynamo=True returns the program
        _strip(program.model)
        _lay_out(program.model)
        program.save(path, external_data=True)
        for value in program.model.graph.initializers.values():
            value.const_value = None  # the exporter's own cycles would keep the weights in memory
    path.with_name(GRAPH_DATA).chmod(path.stat().st_mode)  # written for the owner alone
    _check_contract(onnx.load_model(path, load_external_data=False).graph, input_, output)


def _strip(model: onnx_ir.Model) -> None:
    """Take out what the exporter says of its own sources."""
    graph = model.graph
    for item in (model, graph, *graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        item.metadata_props.clear()
        item.doc_string = None
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()


def _lay_out(model: onnx_ir.Model) -> None:
    """Have every weight copied into row-major order just before it is written.

    Weights of linear layers are transposed views here, which numpy writes element by element: 5 s for ViT-L.
    """
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = _copied_when_written(value.const_value)


def _copied_when_written(tensor: onnx_ir.TensorProtocol) -> onnx_ir.LazyTensor:
    def row_major() -> onnx_ir.TensorProtocol:
        array = tensor.numpy()
        # torch transposes several times faster than numpy, but knows no bfloat16 of numpy's: both see integers.
        integers = torch.from_numpy(array.view(f"i{array.itemsize}")).contiguous().numpy()
        return onnx_ir.Tensor(integers.view(array.dtype), dtype=tensor.dtype)

    shape = onnx_ir.Shape(tensor.numpy().shape)
    return onnx_ir.LazyTensor(row_major, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _check_contract(graph: onnx.GraphProto, input_: TensorSpec, output: TensorSpec) -> None:
    for found, expected in ((list(graph.input), input_), (list(graph.output), output)):
        shapes = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in found]
        kinds = [v.type.tensor_type.elem_type for v in found]
        if (
            [v.name for v in found] != [expected.name]
            or shapes != [expected.shape]
            or kinds != [INPUT_DTYPES[expected.dtype]]
        ):
            raise BuildError(
                f"the traced graph has {[v.name for v in found]} of shape {shapes} and types {kinds}; "
                f"{expected.name} {expected.shape} {expected.dtype} is expected."
            )
    for tensor in graph.initializer:
        if tensor.data_type in INPUT_DTYPES.values() and tensor.data_type != INPUT_DTYPES[input_.dtype]:
            raise BuildError(f"initialiser {tensor.name} is not {input_.dtype}: the tower was not cast as a whole.")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's remarks on its own internals (torchvision, pytree) out of ours."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
