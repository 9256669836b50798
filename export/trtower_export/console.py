"""Print what a command does: progress (live on a terminal, one line per step elsewhere), text and wide tables."""

import dataclasses
import gc
import json
import logging
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.table import Table

WIDTH = 160
"""Minimum width of a table in characters, so that a narrow terminal does not cut names and numbers."""

LONG_S = 10.0
"""Seconds after which a running step is named if there is no terminal to show a bar."""

TITLE = 58
"""Characters that the title of a finished step takes, before its seconds."""

logger = logging.getLogger(__name__)


class Step:
    """A running step. This base class ignores updates: a log gets only one line, when the step has ended."""

    def update(self, fraction: float, note: str) -> None:
        """Report which fraction of the step is done, 0 to 1, and what is happening now."""


class Progress(Protocol):
    """Receives the steps of a long job."""

    def step(self, title: str) -> AbstractContextManager[Step]:
        """Start a step, which ends with the `with` block."""

    def say(self, message: str) -> None:
        """Report a decision that is not an error."""


class LoggedProgress:
    """Progress for programs: the log, at level INFO."""

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Log a step and its seconds if it succeeds."""
        start = time.perf_counter()
        yield Step()
        logger.info("%s: %.1f s", title, time.perf_counter() - start)

    def say(self, message: str) -> None:
        """Log a message."""
        logger.info("%s", message)


class ConsoleProgress:
    """Progress for people, on a console that may or may not be a terminal."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a bar while the step runs, and print a line with its seconds if it succeeds.

        Without a terminal there is no bar; a long step is then named while it runs.
        """
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        start = time.perf_counter()
        spinner = SpinnerColumn("line" if self._console.options.ascii_only else "dots")
        columns = (spinner, TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
        note = TextColumn("[dim]{task.fields[note]}")
        silent = not self._console.is_terminal
        long = threading.Timer(LONG_S, self.say, [f"{title} …"])
        long.daemon = True
        if silent:
            long.start()
        try:
            with Bars(*columns, note, console=self._console, transient=True, disable=silent) as bars:
                yield ConsoleStep(bars, title)
        finally:
            long.cancel()
        width = min(TITLE, self._console.width - 11)  # the indent and the seconds
        self.say(f"{title.ljust(width)} {time.perf_counter() - start:6.1f} s")

    def say(self, message: str) -> None:
        """Print a message."""
        say(self._console, f"  {message}")


class ConsoleStep(Step):
    """One bar of ConsoleProgress."""

    def __init__(self, bars: "Bars", title: str) -> None:
        self._bars = bars
        self._task = bars.add_task(title, total=None, note="")

    def update(self, fraction: float, note: str) -> None:
        """Move the bar."""
        self._bars.update(self._task, total=1.0, completed=fraction, note=note)


def say(console: "Console", text: str) -> None:
    """Print text unchanged: not folded or coloured, and without markup or emoji codes."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def as_json(value: Any) -> str:
    """Return a dataclass or plain data as indented JSON. NaN and infinities are a bug, and raise ValueError."""
    return json.dumps(value, indent=2, allow_nan=False, default=dataclasses.asdict)


@contextmanager
def importing(progress: Progress) -> Iterator[None]:
    """Show the step in which a command imports its libraries, and keep the garbage collector out of them.

    Imported modules stay, so searching them for garbage is wasted work: a second of an export. Only the first command
    of a process freezes them, since a later one imports nothing and would freeze the first one's garbage.
    """
    collects, is_first = gc.isenabled(), "transformers" not in sys.modules
    gc.disable()
    try:
        with progress.step("Import PyTorch and transformers"):
            yield
    finally:
        if is_first:
            gc.freeze()
        if collects:
            gc.enable()


def new_table(*columns: str, left: Collection[str]) -> "Table":
    """Make a table without lines or folded columns. Columns in ``left`` hold words, the others numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def print_whole(console: "Console", table: "Table") -> None:
    """Print a table with every column whole, however narrow the console is."""
    from rich.console import Console

    Console(file=console.file, width=max(console.width, WIDTH)).print(table)  # print() itself only narrows
