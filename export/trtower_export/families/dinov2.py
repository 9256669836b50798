"""DINOv2: Meta's ViTs that load as `Dinov2Model`."""

from torch import Tensor, nn

from trtower_export.families.base import Family


def _stem(model: nn.Module) -> nn.Module:
    stem = model.get_submodule("embeddings")
    stem.register_parameter("mask_token", None)  # of training only
    return stem


def _layers(model: nn.Module) -> nn.ModuleList:
    layers = model.get_submodule("encoder.layer")
    assert isinstance(layers, nn.ModuleList)  # noqa: S101 - narrows the type
    return layers


def _run_layer(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    output = layer(hidden_states)
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


FAMILY = Family(
    name="dinov2",
    model_types=("dinov2",),
    model_class="Dinov2Model",
    num_prefix_tokens=lambda config: 1,
    stem=_stem,
    layers=_layers,
    run_layer=_run_layer,
    preprocessor={
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
)
