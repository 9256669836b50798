"""What the example uses of github.com/NVlabs/VILA."""

from typing import Any

from tests.runtime.installation.original import draw_vila


def load(path: str, model_base: str | None = None) -> Any:
    assert model_base is None
    return draw_vila(path)
