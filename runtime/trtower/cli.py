"""The command `trtower`: the commands that deployment needs, and those of the export side if it is installed.

The export side registers its commands as entry points, so this module never imports it. Nothing here imports torch
before a command needs it: help and shell completion answer at once.
"""

import codecs
import errno
import json
import logging
import os
import sys
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trtower import __version__
from trtower.errors import ConfigError, TrtowerError, one_line
from trtower.extras import extra_of, how_to_install, import_extra, why_broken

if TYPE_CHECKING:
    import typer


INTERRUPTED = 130
LONGEST = 4000
"""Error messages are cut after this many characters. trtower's own are shorter; quoted input can be longer."""

IN_ASCII = {
    **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}─", "-"),
    **dict.fromkeys("│├", "|"),
    **dict.fromkeys("\N{MULTIPLICATION SIGN}✕", "x"),
    **dict.fromkeys("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}", "'"),
    **dict.fromkeys("“”", '"'),
    **{"└": "`", "‖": "||", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "±": "+-", "·": "*", "∞": "inf"},
}
"""How to write characters that a terminal does not have."""


def main() -> None:
    """Run the command. Exit 0 if it succeeded, 1 if it failed, 2 for wrong usage and 130 for Ctrl-C."""
    codecs.register_error("trtower", _transliterate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not if it is closed
            stream.reconfigure(errors="trtower")
    if "_TRTOWER_COMPLETE" in os.environ:
        os.environ["COLUMNS"] = "1000"  # typer would wrap a candidate's help into lines that look like candidates
    code = run(sys.argv[1:])
    try:
        print(end="", flush=True)  # noqa: T201
    except OSError as err:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it exits
        reader_left = isinstance(err, BrokenPipeError)  # as in `trtower inspect … | head -1`
        code = code or (1 if reader_left else _fail(f"cannot write the output: {err.strerror}", 1))
    sys.exit(code)


def _transliterate(err: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that a stream cannot encode: the error handler of stdout and stderr."""
    if not isinstance(err, UnicodeEncodeError):
        raise err
    character = err.object[err.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not text in this locale
        return bytes([ord(character) - 0xDC00]), err.start + 1
    return IN_ASCII.get(character, ascii(character)[1:-1]), err.start + 1


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
        if hasattr(err, "format_message"):  # click's own errors have an exit code and a message
            message = err.format_message()
            if any(a.startswith("--batch") for a in arguments) and "unexpected extra argument" in message:
                message += ": separate the numbers after --batch with commas, as in --batch 1,8,32"
            elif context := getattr(err, "ctx", None):
                message = f"{message.rstrip('.')}. See {context.command_path} --help."
            return _fail(message, getattr(err, "exit_code", 2))
        message = None if debug else _explain(err) or _explain_locale(err, arguments)
        if message is None:  # a bug, which shows its traceback
            raise
        return _fail(message, 2 if isinstance(err, ConfigError) else 1)
    if result == INTERRUPTED:  # typer turns Ctrl-C into an exit code
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _explain(err: Exception) -> str | None:
    """Explain an error in one line; return None if it is a bug of trtower."""
    if isinstance(err, TrtowerError):
        return str(err)
    if isinstance(err, ModuleNotFoundError) and (extra := extra_of(err.name or "")):
        return f"this command needs the package {str(err.name).partition('.')[0]}: {how_to_install(extra)}"
    if broken := why_broken(err):
        return broken
    if isinstance(err, OSError) and err.filename is not None:
        return f"{err.filename}: {err.strerror}"
    if isinstance(err, OSError) and err.errno == errno.ENOSPC:
        return f"cannot write the output: {err.strerror}"
    return None


def _explain_locale(err: Exception, arguments: list[str]) -> str | None:
    """Explain an unexpected error if a path cannot be decoded in this locale; many libraries reject such paths."""
    for path in (*arguments, str(Path.cwd())):
        if any("\udc80" <= character <= "\udcff" for character in path):
            return (
                f"{path} cannot be decoded as {sys.getfilesystemencoding()}, the encoding of this locale, which may be "
                f"why this failed: {one_line(err)}. Run with PYTHONUTF8=1, or rename it; --debug shows the traceback."
            )
    return None


def _fail(message: str, code: int) -> int:
    line = one_line(message)
    if len(line) > LONGEST:  # the message quotes an argument, such as a file's content passed instead of its name
        line = f"{line[:LONGEST]} … ({len(line) - LONGEST} characters more)"
    print(f"error: {line}", file=sys.stderr)  # noqa: T201
    return code


def _backends(incomplete: str) -> list[str]:
    """Complete the name of a backend."""
    from trtower.runners.choose import backend_names

    return [name for name in backend_names() if name.startswith(incomplete)]


BATCHES_HELP = "Batch sizes to time, as in 1,8,32. Default: those of the profiles; on a CPU only the smallest."
"""What `--batch` says in the commands that time something."""


def read_batches(texts: list[str] | None) -> list[int] | None:
    """Read every `--batch` of a command that times something; None if there is none."""
    return [number for text in texts for number in read_numbers(text)] if texts else None


def read_numbers(text: str) -> list[int]:
    """Read the numbers of an option `--batch`, separated by commas; raise ConfigError if they are none."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as err:
        raise ConfigError(f"--batch {text}: expected whole numbers separated by commas, such as 1,8,32.") from err


def _app() -> "typer.Typer":
    import typer

    app = typer.Typer(
        name="trtower",
        help="Compile the vision tower of a LLaVA-like model into a bundle, check it and inspect it.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    def print_version(*, requested: bool = True) -> None:
        if requested:
            print(f"trtower {__version__}")  # noqa: T201
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
        if not verbose:  # matplotlib warns if it cannot write its cache, but still draws
            logging.getLogger("matplotlib").setLevel(logging.ERROR)

    @app.command()
    def version() -> None:
        """Print the version."""
        print_version()

    _add_inspect(app)
    _add_verify(app)
    _add_tune(app)
    for point in sorted(entry_points(group="trtower.commands"), key=lambda point: point.name):
        app.command(point.name)(point.load())
    return app


def _add_inspect(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def inspect(
        bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
        why: Annotated[bool, typer.Option("--why", help="List what each plan needs, and whether it is met.")] = False,
        json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> int:
        """Describe a bundle and what can run it here.

        Explains why the other backends cannot run it. Exits with 1 if a file of the bundle is missing or altered.
        """
        from trtower.bundle.bundle import Bundle
        from trtower.inspection import as_text, inspect_bundle

        inspection = inspect_bundle(Bundle.open(bundle, whole=False))
        print(json.dumps(asdict(inspection), indent=2) if json_ else as_text(inspection, why=why))  # noqa: T201
        if inspection.altered:
            return _fail(f"{bundle}: {inspection.describe_damage()}: copy the bundle again", 1)
        return 0


def _add_verify(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def verify(
        bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
        backend: Annotated[
            str,
            typer.Option(
                metavar="NAME", help="Backend to run the bundle on, as for VisionTower.load.", autocompletion=_backends
            ),
        ] = "auto",
        json_: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
    ) -> int:
        """Compare a bundle with its golden answers.

        Runs it on the device that serves it and writes the certificate. Needs neither the checkpoint nor transformers.
        Exits with 1 if the result misses a bound.
        """
        from trtower.bundle.bundle import Bundle
        from trtower.bundle.manifest import MANIFEST
        from trtower.parity.verify import as_text, check_certifiable, verify, write_certificate

        opened = Bundle.open(bundle)
        check_certifiable(opened)
        certificate = verify(
            opened,
            backend=backend,
            on_batch=lambda size: print(f"batch {size} …", file=sys.stderr, flush=True),  # noqa: T201
        )
        print(json.dumps(asdict(certificate), indent=2) if json_ else as_text(opened, certificate), flush=True)  # noqa: T201
        write_certificate(opened, certificate)
        print(f"the certificate is in {opened.path / MANIFEST}", file=sys.stderr)  # noqa: T201
        return 0 if certificate.passed else 1


def _add_tune(app: "typer.Typer") -> None:
    import typer

    @app.command()
    def tune(
        bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
        device: Annotated[
            str | None,
            typer.Option(metavar="NAME", help="Where to run: cuda, cuda:INDEX or cpu. Default: the GPU, if any."),
        ] = None,
        batch: Annotated[
            list[str] | None,
            typer.Option("--batch", metavar="N,N", help=BATCHES_HELP),
        ] = None,
        json_: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
    ) -> int:
        """Find the fastest backend for a bundle here.

        Races those that can run its graph, writes the times into it, and lets auto follow them where no plan runs.
        """
        from trtower.bundle.bundle import Bundle
        from trtower.bundle.manifest import MANIFEST
        from trtower.runners.tune import as_text, tune_bundle

        tuned = tune_bundle(
            Bundle.open(bundle),
            device=device,
            batches=read_batches(batch),
            on_step=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )
        tuning = tuned.manifest.tunings[-1]
        print(json.dumps(asdict(tuning), indent=2) if json_ else as_text(tuned, tuning, device), flush=True)  # noqa: T201
        print(f"the tuning is in {tuned.path / MANIFEST}", file=sys.stderr)  # noqa: T201
        return 0
