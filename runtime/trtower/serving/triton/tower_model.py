"""What Triton's Python backend runs for a tower: the bundle beside the model's code, through trtower.

Triton starts one process for each instance, batches the requests, and passes several at once to `execute`. What fails
is an error of the one request that is to blame; paths and internals go to the server's log, and not to a client.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as triton

from trtower.errors import TrtowerError, one_line
from trtower.serving.tensors import PIXEL_VALUES, as_array
from trtower.tower.vision_tower import VisionTower

BUNDLE = "bundle"

Answer = torch.Tensor | Any
"""Features, or an error of Triton's."""


class TritonPythonModel:
    """A tower in one instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle; Triton then warms it up as the config says. An error keeps the model from being ready."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        try:
            self._tower = VisionTower.load(
                Path(args["model_repository"]) / args["model_version"] / BUNDLE,
                backend=parameters["backend"],
                device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
                require_certificate=parameters["require_certificate"] == "true",
                check_finite=False,  # done here, in a client's words
            )
        except TrtowerError as err:
            raise triton.TritonModelException(one_line(err)) from err
        self._output = config["output"][0]["name"]
        triton.Logger.log_info(f"{args['model_instance_name']} runs on {self._tower.backend}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer several requests with one call of the tower."""
        images = [torch.from_numpy(_writable(request)) for request in requests]
        return [self._respond(answer) for answer in self._answer(images)]

    def finalize(self) -> None:
        """Free the engine."""
        self._tower.close()

    def _answer(self, images: Sequence[torch.Tensor]) -> list[Answer]:
        errors = [_what_is_wrong(each) for each in images]
        sound = [each for each, error in zip(images, errors, strict=True) if error is None]
        features = iter(self._run(sound) if sound else [])
        return [next(features) if error is None else error for error in errors]

    def _run(self, images: Sequence[torch.Tensor]) -> list[Answer]:
        try:
            features = self._tower.run_prepared(torch.cat([*images]) if len(images) > 1 else images[0]).cpu()
        except Exception as err:  # noqa: BLE001 - the server lives on
            triton.Logger.log_error(f"the tower failed: {type(err).__name__}: {one_line(err)}")
            return [triton.TritonError("the tower failed; the server's log says why")] * len(images)
        return [*features.split([len(each) for each in images])]

    def _respond(self, answer: Answer) -> Any:
        if not isinstance(answer, torch.Tensor):
            return triton.InferenceResponse(error=answer)
        return triton.InferenceResponse(output_tensors=[triton.Tensor(self._output, as_array(answer))])


def _what_is_wrong(images: torch.Tensor) -> Any:
    """Return an error for pixels that are no numbers, also on a GPU, where features are waited for anyway."""
    if not images.is_floating_point() or bool(images.isfinite().all()):
        return None
    return triton.TritonError(f"{PIXEL_VALUES} holds NaN or infinity", triton.TritonError.INVALID_ARG)


def _writable(request: Any) -> Any:
    array = triton.get_input_tensor_by_name(request, PIXEL_VALUES).as_numpy()
    return array if array.flags.writeable else array.copy()
