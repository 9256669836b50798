"""The Open Inference Protocol over gRPC: what clients of Triton send, this answers on Ray Serve.

https://github.com/kserve/open-inference-protocol, with tritonclient's messages. As on Triton, the model NAME takes
prepared pictures, and NAME-encoded the bytes of JPEGs and the like; tensors travel as raw contents.
"""

import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trtower.errors import InputError, one_line
from trtower.extras import import_extra
from trtower.serving.ray.options import PURPOSE
from trtower.serving.ray.replica import TowerReplica, UnhealthyError, as_tensor, logger, ray
from trtower.serving.tensors import BYTES, IMAGE, PIXEL_VALUES, as_array, wire_type

messages = import_extra("tritonclient.grpc.service_pb2", extra="ray", purpose=PURPOSE)
tensors = import_extra("tritonclient.utils", extra="ray", purpose=PURPOSE)
grpc = import_extra("grpc", extra="ray", purpose=PURPOSE)

# Requests travel from Ray's proxies to replicas by pickle, which looks for the messages under their generated name.
sys.modules.setdefault("grpc_service_pb2", messages)

VERSION = "1"
"""The protocol names versions of a model. Ray serves one at a time, and changes it by a new deployment."""

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")
"""What is answered. Triton's extensions of the protocol are UNIMPLEMENTED."""

NOT_DONE = ("classification", "shared_memory_region")
"""Parameters of tensors that would change the answer."""


def add_open_inference(servicer: Any, server: Any) -> None:
    """Make Ray Serve's gRPC proxies accept the protocol: name this function in `grpc_servicer_functions`."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=getattr(messages, f"{name}Request").FromString,
            response_serializer=getattr(messages, f"{name}Response").SerializeToString,
        )
        for name in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class NoModelError(InputError):
    """A request names another model."""


STATUS = {NoModelError: "NOT_FOUND", InputError: "INVALID_ARGUMENT", UnhealthyError: "UNAVAILABLE"}
"""What a client is told to be wrong, and in which words: those of the error. All else is INTERNAL, and only logged."""


class OpenInference(TowerReplica):
    """A tower in one replica, with the methods of the protocol."""

    async def ServerLive(self, request: Any) -> Any:  # noqa: N802 - the protocol's name
        """Say that a replica answers."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any) -> Any:  # noqa: N802
        """Say whether the tower may be called."""
        return messages.ServerReadyResponse(ready=self.is_healthy)

    async def ModelReady(self, request: Any) -> Any:  # noqa: N802
        """Say whether the tower may be called by this name."""
        return messages.ModelReadyResponse(ready=self._has(request.name, request.version) and self.is_healthy)

    async def ServerMetadata(self, request: Any) -> Any:  # noqa: N802
        """Say what serves."""
        return messages.ServerMetadataResponse(name="trtower on Ray Serve", version=ray.__version__)

    async def ModelMetadata(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Describe the tensors that a model takes and gives."""
        with _told_to_client(grpc_context):
            manifest, input_ = self.tower.bundle.manifest, self._input_of(request.name, request.version)
            answer = messages.ModelMetadataResponse(name=request.name, versions=[VERSION], platform="trtower")
            row = [1] if input_ == IMAGE else manifest.input.row
            answer.inputs.add(name=input_, datatype=self._type_of(input_), shape=[-1, *row])
            output, row = manifest.output, self.tower.feature_shape
            answer.outputs.add(name=output.name, datatype=wire_type(output.dtype), shape=[-1, *row])
            return answer

    async def ModelInfer(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """Turn pictures into features; the answer also says which tower they are of."""
        manifest = self.tower.bundle.manifest
        with _told_to_client(grpc_context):
            input_ = self._input_of(request.model_name, request.model_version)
            content = _read(request, input_, self._type_of(input_), manifest.output.name)
            features = await (self.encode(content) if input_ == IMAGE else self.infer(as_tensor(content)))
        return _write(request, manifest.output.name, features, self._facts)

    @property
    def _facts(self) -> dict[str, str]:
        """What decides the features: the tower, what is read of it, and what ran it."""
        return {
            "tower_sha256": self.tower.bundle.manifest.tower_sha256,
            "select_layer": str(self.tower.select_layer),
            "select_feature": self.tower.select_feature,
            "backend": self.tower.backend,
        }

    @property
    def _inputs(self) -> dict[str, str]:
        """The input of each model."""
        return {self.name: PIXEL_VALUES, f"{self.name}-encoded": IMAGE}

    def _type_of(self, input_: str) -> str:
        return BYTES if input_ == IMAGE else wire_type(self.tower.bundle.manifest.input.dtype)

    def _has(self, model: str, version: str) -> bool:
        return model in self._inputs and version in ("", VERSION)

    def _input_of(self, model: str, version: str) -> str:
        if not self._has(model, version):
            raise NoModelError(
                f"no model {model}{f' {version}' if version else ''} here, only {' and '.join(self._inputs)}, version "
                f"{VERSION}; with several applications, name one in the request's metadata `application`"
            )
        return self._inputs[model]


@contextmanager
def _told_to_client(context: Any) -> Iterator[None]:
    """Give a failed request a status and one line."""
    try:
        yield
    except Exception as err:
        known = next((code for kind, code in STATUS.items() if isinstance(err, kind)), None)
        if known is None:
            logger.exception("the tower failed")
        context.set_code(grpc.StatusCode[known or "INTERNAL"])
        context.set_details(one_line(err) if known else "the tower failed; the log of the replica says why")
        raise


def _read(request: Any, input_: str, datatype: str, output: str) -> Any:
    """Return the only tensor of a request: an array, or of encoded pictures a list of bytes. Raises InputError."""
    for asked in request.outputs:
        if asked.name != output:
            raise InputError(f"no output is called {asked.name}, only {output}")
    _refuse_unserved(*request.inputs, *request.outputs)
    if (names := [each.name for each in request.inputs]) != [input_]:
        raise InputError(f"inputs {', '.join(names)}; expected {input_}")
    tensor = request.inputs[0]
    if tensor.datatype != datatype:
        raise InputError(f"{input_} is {tensor.datatype}; expected {datatype}")
    if len(request.raw_input_contents) != 1:
        raise InputError(f"{input_} came without raw contents: typed contents are not served")
    content, shape = request.raw_input_contents[0], [*tensor.shape]
    if any(side < 0 for side in shape) or (input_ == IMAGE and shape[1:] not in ([], [1])):
        raise InputError(f"{input_} has shape {tuple(shape)}; expected {'(B, 1)' if input_ == IMAGE else 'no -1'}")
    try:
        if datatype == BYTES:
            return [*tensors.deserialize_bytes_tensor(content).reshape(shape).reshape(-1)]
        return np.frombuffer(content, tensors.triton_to_np_dtype(datatype)).reshape(shape)
    except (ValueError, struct.error) as err:
        raise InputError(f"{input_} has {len(content)} bytes, which are no {datatype} of shape {tuple(shape)}") from err


def _refuse_unserved(*tensors_: Any) -> None:
    """Raise InputError if a client asks for something that would change the answer."""
    for each in tensors_:
        if unserved := [name for name in NOT_DONE if name in each.parameters]:
            raise InputError(f"{each.name} asks for {unserved[0]}, which is not served here")


def _write(request: Any, output: str, features: torch.Tensor, facts: Mapping[str, str]) -> Any:
    """Make the answer: features as one tensor, and what they are of."""
    array = as_array(features)
    response = messages.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    for name, value in facts.items():
        response.parameters[name].string_param = value
    response.outputs.add(name=output, datatype=tensors.np_to_triton_dtype(array.dtype), shape=array.shape)
    response.raw_output_contents.append(array.tobytes())
    return response
