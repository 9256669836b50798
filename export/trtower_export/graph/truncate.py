"""Cut a tower after the deepest layer that is read.

The cut comes before tracing, so that dead layers are neither moved nor exported. An ONNX optimiser could also remove
them, but would keep their weights in memory until it ran.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from trtower.spec import TowerSpec
from trtower_export.families import Family


class TruncatedTower(nn.Module):
    """A tower that turns pixels (B, 3, S, S) into the hidden states that are read, concatenated: (B, P + N, D).

    With a head it returns what that makes of their tokens.

    Attributes:
        pixels: Prepares bytes, if the engine takes them; the tower itself then accepts both bytes and floats.
        head: Turns the tokens that the model reads, (B, T, D), into features.
    """

    def __init__(self, model: nn.Module, family: Family, spec: TowerSpec, head: nn.Module | None = None) -> None:
        super().__init__()
        pieces = family.take_apart(model, spec.image_size)
        self.pixels: nn.Module | None = None
        self.stem = pieces.stem
        self.layers = pieces.layers[: spec.depth]
        self.final_norm = pieces.final_norm if spec.reads_final_norm else None
        self.head = head
        self._run_layer, self._join = family.run_layer, pieces.join
        self._read, self._first = spec.layers, spec.first_read

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Run only the layers that are needed."""
        if pixel_values.dtype == torch.uint8 and self.pixels is not None:
            pixel_values = self.pixels(pixel_values).to(next(self.stem.parameters()).dtype)
        flow = self._run(pixel_values)
        return self.read({index: self._join(flow[index]) for index in self._read})

    def states(self, pixel_values: Tensor) -> list[Tensor]:
        """Return hidden states 0 to the deepest that is read, each (B, P + N, width), and the final norm's if read."""
        return [self._join(each) for each in self._run(pixel_values)]

    def _run(self, pixel_values: Tensor) -> list[Any]:
        flow: list[Any] = [self.stem(pixel_values)]
        for layer in self.layers:
            flow.append(self._run_layer(layer, flow[-1]))
        if self.final_norm is not None:
            flow.append(self.final_norm(flow[-1]))
        return flow

    def read(self, states: Mapping[int, Tensor] | Sequence[Tensor]) -> Tensor:
        """Concatenate the states that are read, (B, P + N, D), and run the head on their tokens if there is one."""
        read = [states[index] for index in self._read]
        tokens = torch.cat(read, dim=-1) if len(read) > 1 else read[0]
        if self.head is None:
            return tokens
        features: Tensor = self.head(tokens[:, self._first :] if self._first else tokens)
        return features


def truncate(model: nn.Module, family: Family, spec: TowerSpec, head: nn.Module | None = None) -> TruncatedTower:
    """Return the part of a full tower that ``spec`` reads, followed by ``head``.

    It shares the weights of both, which require no gradients from then on. The model stays whole.
    """
    tower = TruncatedTower(model, family, spec, head).eval()
    return tower.requires_grad_(requires_grad=False)


def release(tower: nn.Module, program: ExportedProgram) -> None:
    """Free the weights of a tower, and of the traced copy if there is one. Neither can be used afterwards.

    The exporter of PyTorch 2.13 leaves references to traced weights that garbage collection does not find, and the
    build that follows needs the memory.
    """
    for parameter in (*tower.parameters(), *program.state_dict.values()):
        parameter.data = torch.empty(0)
