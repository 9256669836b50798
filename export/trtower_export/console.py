"""What a command prints: how it is getting on, live on a terminal and one line per step elsewhere, and wide tables."""

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
"""Characters that a table may take, whatever is at the other end of a pipe: names and numbers are there whole."""


LONG_S = 10.0
"""After which a step is named where no bar moves."""

logger = logging.getLogger(__name__)


class Step:
    """A step under way. This one says nothing between start and end: a log wants facts, not movement."""

    def update(self, fraction: float, note: str) -> None:
        """Say what is done now, and how much of the step lies behind, 0 to 1."""


class Progress(Protocol):
    """Receives the steps of a long work."""

    def step(self, title: str) -> AbstractContextManager[Step]:
        """Open a step; it ends with the block."""

    def say(self, message: str) -> None:
        """Tell something that was decided and is not an error."""


class LoggedProgress:
    """Progress for programs: the log, at INFO."""

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Log a step with its seconds once it ended well."""
        start = time.perf_counter()
        yield Step()
        logger.info("%s: %.1f s", title, time.perf_counter() - start)

    def say(self, message: str) -> None:
        """Log a message."""
        logger.info("%s", message)


class ConsoleProgress:
    """Progress for people: rich's, on a console that is a terminal or not."""

    def __init__(self, console: "Console") -> None:
        self._console = console

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show a bar that moves while the step runs, and a line with its seconds once it ended well.

        Where there is no terminal for a bar, a step that takes long is named while it runs.
        """
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        start = time.perf_counter()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
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
        self._console.print(f"  {title:<58} {time.perf_counter() - start:6.1f} s", highlight=False, markup=False)

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
    """Print text as it is: not folded, not coloured, and no brackets of it read as markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def as_json(found: Any) -> str:
    """Write a dataclass, or what JSON has, as indented JSON; NaN and infinities are a bug."""
    return json.dumps(found, indent=2, allow_nan=False, default=dataclasses.asdict)


@contextmanager
def importing(progress: Progress) -> Iterator[None]:
    """Show the step in which a command imports what it needs.

    What is imported stays, so no garbage is looked for in it, then or later: a second of an export. A second command in
    the same process imports nothing, and would keep the garbage of the first.
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
    """Make a table without lines; no column is folded, and those in ``left`` are words, the others numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def print_whole(console: "Console", table: "Table") -> None:
    """Print a table with every column whole, however narrow the console says it is."""
    from rich.console import Console

    Console(file=console.file, width=max(console.width, WIDTH)).print(table)  # print() itself only narrows
