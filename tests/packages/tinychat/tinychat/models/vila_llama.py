from typing import Any

from tests.runtime.installation.original import draw_vila


def VilaLlamaForCausalLM(config: Any) -> Any:  # noqa: N802 - a class there
    return draw_vila(config.name_or_path)
