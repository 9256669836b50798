"""What Triton's Python backend runs to prepare encoded pictures: bytes of JPEG, PNG and the like into pixels."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from trtower.bundle.manifest import PREPROCESSOR
from trtower.errors import InputError
from trtower.serving.tensors import IMAGE, PIXEL_VALUES
from trtower.tower.bytes_processor import BytesProcessor
from trtower.tower.encoded import describe, no_limit_of_pillow, open_encoded
from trtower.tower.prepare import count_threads, in_order, prepare


class TritonPythonModel:
    """Prepares the pictures of a tower that takes bytes."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read how the bundle prepares pictures."""
        config = json.loads(args["model_config"])
        self._limits = {key: int(value["string_value"]) for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        self._processor = BytesProcessor.from_file(folder / PREPROCESSOR)
        self._threads = count_threads(None)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Prepare the pictures of several requests in several threads."""
        inputs = [triton.get_input_tensor_by_name(request, IMAGE).as_numpy().reshape(-1) for request in requests]
        contents = [content for each in inputs for content in each]
        with no_limit_of_pillow():
            prepared = iter([*in_order(self._prepare, contents, threads=self._threads, ahead=len(contents))])
        return [self._respond([next(prepared) for _ in each]) for each in inputs]

    def _prepare(self, content: bytes) -> Any:
        """Return pixels (1, …), or what is wrong with a picture."""
        try:
            with open_encoded(content, **self._limits) as image:
                return prepare(self._processor, image).numpy()
        except (InputError, OSError) as err:
            return describe(err)

    def _respond(self, prepared: Sequence[Any]) -> Any:
        for index, each in enumerate(prepared):
            if isinstance(each, str):
                return triton.InferenceResponse(
                    error=triton.TritonError(f"{IMAGE}[{index}]: {each}", triton.TritonError.INVALID_ARG)
                )
        return triton.InferenceResponse(output_tensors=[triton.Tensor(PIXEL_VALUES, np.concatenate([*prepared]))])
