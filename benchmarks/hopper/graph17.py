"""Write CLIP ViT-L/14-336, cut after 23 of 24 layers, in FP16 as ONNX of opset 17, with inputs and answers beside it.

    python benchmarks/hopper/graph17.py FOLDER [--small]

TensorRT 8.6 ends at opset 17: it parses LayerNormalization, but neither Attention nor Gelu. Weights and images are
drawn (seed 0), on a GPU if there is one, and the answers are those of PyTorch in FP32 and in FP16. With --small the
tower has two layers, to try this without a GPU.
"""

import argparse
import pathlib
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

SIZES: dict[bool, dict[str, Any]] = {
    False: {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    True: {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
}
IMAGES = 32


class Cut(torch.nn.Module):
    """Embeddings, pre-norm and all layers but the last: (B, 3, S, S) -> (B, 1 + N, D)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        inner: Any = getattr(model, "vision_model", model)
        self.embeddings, self.norm, self.layers = inner.embeddings, inner.pre_layrnorm, inner.encoder.layers[:-1]

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """Return hidden state -2."""
        states = self.norm(self.embeddings(pixel_values))
        for layer in self.layers:
            states = layer(states, attention_mask=None)
            states = states[0] if isinstance(states, tuple) else states
        return states


def draw_tower(attention: str, *, small: bool = False) -> Cut:
    """Draw the tower, on the CPU and in FP32; the same one every time."""
    torch.manual_seed(0)
    options: dict[str, Any] = {**SIZES[small], "attn_implementation": attention}
    return Cut(CLIPVisionModel(CLIPVisionConfig(**options))).eval()


def main() -> None:
    """Write tower17.onnx, answers.pt for PyTorch, and images.f16 for what has no PyTorch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    folder: pathlib.Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tower = draw_tower("eager", small=given.small).to(device)
    side = SIZES[given.small]["image_size"]
    images = torch.randn(IMAGES, 3, side, side).to(device).half()
    with torch.no_grad():
        reference = torch.cat([tower(piece.float()) for piece in images.split(4)])
        half = tower.half()
        eager = torch.cat([half(piece) for piece in images.split(4)])
        torch.onnx.export(
            half,
            (images[:2],),
            str(folder / "tower17.onnx"),
            input_names=["pixel_values"],
            output_names=["hidden_states"],
            dynamic_axes={"pixel_values": {0: "batch"}, "hidden_states": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    torch.save({"images": images.cpu(), "fp32": reference.cpu(), "fp16_eager": eager.cpu()}, folder / "answers.pt")
    (folder / "images.f16").write_bytes(images.cpu().numpy().tobytes())
    error = ((eager.float() - reference).norm() / reference.norm()).item()
    size = (folder / "tower17.onnx").stat().st_size
    print(f"tower17.onnx: {size / 1e6:.1f} MB, drawn on {device}; PyTorch's own FP16 error {error:.2e}")


if __name__ == "__main__":
    main()
