import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtower.runners.holder import Holder


class FakeRunner(SimpleNamespace):
    def close(self) -> None: ...

    def __hash__(self) -> int:
        return id(self)


def test_holder_that_was_made_before_a_fork_belongs_to_whoever_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    holder, runner = Holder("engines/a"), FakeRunner(device=torch.device("cpu"))
    opened: Any = runner
    parent = os.getpid()
    monkeypatch.setattr("trtower.runners.holder._opened_in", set())
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    holder.swap(opened)
    with holder.lend() as lent:
        assert lent is opened
    holder.close()
    assert holder.runner is None
