"""Progress reports what is done, and that a long step still runs."""

import gc
import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from trtower_export import console
from trtower_export.console import ConsoleProgress, importing


def test_long_step_is_named_while_it_runs_if_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LONG_S", 0.5)
    stream = io.StringIO()
    progress = ConsoleProgress(Console(file=stream, width=100))
    with progress.step("Think"):
        assert not stream.getvalue()
        deadline = time.monotonic() + 10
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stream.getvalue() == "  Think …\n"
    with progress.step("Act"):
        pass
    time.sleep(0.7)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["Think", "Think", "Act"]


@pytest.mark.parametrize("is_first", [True, False])
def test_imports_of_the_first_command_are_not_searched_for_garbage(
    monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    stream = io.StringIO()
    gc.unfreeze()
    if is_first:
        monkeypatch.delitem(sys.modules, "transformers", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "transformers", sys)
    try:
        with importing(ConsoleProgress(Console(file=stream, width=100))):
            assert not gc.isenabled()
        assert gc.isenabled()
        assert (gc.get_freeze_count() > 0) == is_first
    finally:
        gc.unfreeze()
    assert stream.getvalue().startswith("  Import PyTorch and transformers ")


def test_garbage_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing(ConsoleProgress(Console(file=io.StringIO(), width=100))):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_every_table_is_printed_whole() -> None:
    """Columns are not folded, so a narrow console would cut them."""
    sources = Path(console.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "console.print(table" in path.read_text(encoding="utf-8")]
