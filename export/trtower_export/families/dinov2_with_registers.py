"""DINOv2 with registers: Meta's ViTs that load as `Dinov2WithRegistersModel`. The prefix is CLS, then the registers."""

from dataclasses import replace

from trtower_export.families import dinov2

FAMILY = replace(
    dinov2.FAMILY,
    name="dinov2_with_registers",
    model_types=("dinov2_with_registers",),
    model_class="Dinov2WithRegistersModel",
    num_prefix_tokens=lambda config: 1 + int(config.num_register_tokens),
)
