"""Progress says what is done, and that it is still being done."""

import io
import time

import pytest
from rich.console import Console

from trtower_export import console
from trtower_export.console import ConsoleProgress


def test_long_step_is_named_while_it_runs_where_no_bar_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LONG_S", 0.5)
    stream = io.StringIO()
    teller = ConsoleProgress(Console(file=stream, width=100))
    with teller.step("Think"):
        assert not stream.getvalue()
        deadline = time.monotonic() + 10
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stream.getvalue() == "  Think …\n"
    with teller.step("Act"):
        pass
    time.sleep(0.7)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["Think", "Think", "Act"]
