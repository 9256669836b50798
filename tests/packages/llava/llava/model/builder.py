from typing import Any

from tests.runtime.installation.original import Letters, draw_llava


def load_pretrained_model(path: str, base: str | None, name: str) -> tuple[Any, Any, Any, int]:
    assert base is None
    assert path.endswith(name)
    model = draw_llava(path)
    return Letters(), model, model.get_vision_tower().image_processor, 2048
