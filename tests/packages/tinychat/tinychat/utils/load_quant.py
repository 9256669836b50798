from typing import Any


def load_awq_model(model: Any, checkpoint: str, bits: int, group_size: int, device: str) -> Any:
    assert (checkpoint, bits, group_size, device) == ("awq.pt", 4, 128, "cpu")
    return model
