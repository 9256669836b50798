"""The command `trtower`: what deployment needs itself, and the export side's commands where they are installed.

The export side registers its commands as entry points, so this module never imports it.
"""

import json
import logging
import sys
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated

from trtower import __version__
from trtower.bundle.bundle import Bundle
from trtower.errors import ConfigError, TrtowerError, one_line
from trtower.extras import extra_of, how_to_install, import_extra, why_broken
from trtower.inspection import as_text, inspect_bundle

if TYPE_CHECKING:
    import typer


INTERRUPTED = 130


def main() -> None:
    """Run the command; exit 0 when done, 1 for a failure, 2 for wrong usage."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command with these arguments and return its exit code."""
    debug = "--debug" in arguments
    try:
        typer = import_extra("typer", extra="cli", purpose="the trtower command")
        import_extra("rich", extra="cli", purpose="the trtower command")
        command = typer.main.get_command(_app())
        typed = [a for a in arguments if a != "--debug"] or ["--help"]
        result = command.main(typed, prog_name="trtower", standalone_mode=False)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except Exception as err:
        if hasattr(err, "format_message"):  # click's own errors know their exit code and their words
            message = err.format_message()
            if any(a.startswith("--batch") for a in arguments) and "unexpected extra argument" in message:
                message += ": numbers after --batch are separated by commas, as in --batch 1,8,32"
            return _fail(message, getattr(err, "exit_code", 2))
        message = None if debug else _explain(err)
        if message is None:  # a bug, which shows its traceback
            raise
        return _fail(message, 2 if isinstance(err, ConfigError) else 1)
    if result == INTERRUPTED:  # typer turns Ctrl-C into an exit code
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _explain(err: Exception) -> str | None:
    """Put an error that is not a bug of trtower into words; None for one that is."""
    if isinstance(err, TrtowerError):
        return str(err)
    if isinstance(err, ModuleNotFoundError) and (extra := extra_of(err.name or "")):
        return f"this command needs the package {str(err.name).partition('.')[0]}: {how_to_install(extra)}"
    if broken := why_broken(err):
        return broken
    if isinstance(err, OSError) and err.filename is not None:
        return f"{err.filename}: {err.strerror}"
    return None


def _fail(message: str, code: int) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)  # noqa: T201
    return code


def _app() -> "typer.Typer":
    import typer

    app = typer.Typer(
        name="trtower",
        help="Compile the vision tower of a LLaVA-like model, and look at what was compiled.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    def print_version(*, asked: bool) -> None:
        if asked:
            print(__version__)  # noqa: T201
            raise typer.Exit

    @app.callback()
    def options(
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
        verbose: Annotated[bool, typer.Option("--verbose", help="Show the log.")] = False,
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
        ] = False,
    ) -> None:
        logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")

    @app.command()
    def version() -> None:
        """Print the version."""
        print(__version__)  # noqa: T201

    @app.command()
    def inspect(
        bundle: Annotated[str, typer.Argument(help="The bundle's folder.")],
        why: Annotated[bool, typer.Option("--why", help="Say what every plan needs, and what of it is met.")] = False,
        json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> int:
        """Say what a bundle is, what of it would run here, and why the rest would not; exit 1 if it was altered."""
        found = inspect_bundle(Bundle.open(bundle, whole=False))
        print(json.dumps(asdict(found), indent=2) if json_ else as_text(found, why=why))  # noqa: T201
        if found.altered:
            return _fail(f"{bundle}: {', '.join(found.altered)} was altered: copy the bundle again", 1)
        return 0

    for point in sorted(entry_points(group="trtower.commands"), key=lambda point: point.name):
        app.command(point.name)(point.load())
    return app
