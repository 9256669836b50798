"""The command `trtower embed`."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trtower.errors import ConfigError, one_line
from trtower.spec import MIB

if TYPE_CHECKING:
    from trtower.embedding.embed import EmbedProgress

MEGA = 10**6
SAY_EVERY_S = 10.0
"""Seconds between two lines of progress where there is no terminal to show a bar."""

NAMED = 3
"""How many of the pictures that were left out are named at the end; all are in a file."""


def embed(
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURES",
            help="Folders, patterns, lists (.txt, or - for standard input), tar files, Parquet files, picture files.",
        ),
    ],
    bundle: Annotated[str, typer.Option(metavar="BUNDLE", help="The bundle's folder.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where to write features; goes on with an earlier run.")],
    format_: Annotated[str, typer.Option("--format", metavar="NAME", help="parquet or safetensors.")] = "parquet",
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float16 or float32. Default: the engine's, float32 for BF16.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of a Parquet file that holds pictures or their paths.")
    ] = None,
    select_layer: Annotated[str | None, typer.Option(metavar="CODE", help="Hidden states to read.")] = None,
    select_feature: Annotated[str | None, typer.Option(metavar="NAME", help="Tokens to read, such as patch.")] = None,
    per_file: Annotated[
        int | None, typer.Option(metavar="N", help="Pictures in a file. Default: 256 MiB of features, at most 1024.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Pictures in one engine call.")] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Threads that read and prepare pictures.")] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="Backend, as for VisionTower.load.")] = "auto",
    device: Annotated[str | None, typer.Option(metavar="NAME", help="Where to run, such as cuda:1.")] = None,
    allow_uncertified: Annotated[
        bool, typer.Option("--allow-uncertified", help="Accept a bundle without a certificate, or a rehearsal.")
    ] = False,
    max_megapixels: Annotated[
        float | None, typer.Option(metavar="N", help="Leave out pictures with more pixels. Default: 89.")
    ] = None,
    max_mib: Annotated[
        float | None, typer.Option(metavar="N", help="Leave out picture files with more bytes. Default: 512.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try pictures again that were left out before.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on Ray: local, auto, or HOST:PORT of this machine's cluster."),
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Engines on Ray. Default: one for each GPU.")] = None,
    cores: Annotated[int | None, typer.Option(metavar="N", help="Processors of each engine on Ray.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the folder's description as JSON.")] = False,
) -> int:
    """Turn pictures into files of features.

    Run it again with the same arguments to go on after it was stopped, or with more pictures. Exits with 0 even if
    pictures had to be left out: they are counted, and named in _left_out.jsonl.
    """
    from trtower.embedding.embed import embed_pictures
    from trtower.embedding.options import EmbedOptions
    from trtower.layer_codes import parse_layer_code
    from trtower.tower.encoded import LARGEST_FILE, LARGEST_PICTURE

    options = EmbedOptions(
        format=format_,
        dtype=dtype,
        column=column,
        select_layer=None if select_layer is None else parse_layer_code(select_layer),
        select_feature=select_feature,
        pictures_per_file=per_file,
        batch_size=batch,
        threads=threads,
        backend=backend,
        device=device,
        allow_uncertified=allow_uncertified,
        max_pixels=_limit("--max-megapixels", max_megapixels, MEGA, LARGEST_PICTURE),
        max_bytes=_limit("--max-mib", max_mib, MIB, LARGEST_FILE),
        retry=retry,
        ray=ray,
        workers=workers,
        cores=cores,
    )
    try:
        with _shown() as show:
            features = embed_pictures(pictures, bundle, out, options, on_progress=show)
    except KeyboardInterrupt:
        print(f"{out} keeps its complete files; the same command goes on.", file=sys.stderr)  # noqa: T201
        raise
    description = features.description
    if json_:
        print(json.dumps(asdict(description), indent=2, ensure_ascii=False))  # noqa: T201
        return 0
    shape = " x ".join(map(str, description.shape))
    print(f"{out}: {description.pictures} pictures, {description.dtype} ({shape}), {len(features.files)} files")  # noqa: T201
    left_out = features.left_out
    for each in left_out[:NAMED]:
        print(f"left out: {one_line(each.name)}: {each.reason}")  # noqa: T201
    if len(left_out) > NAMED:
        print(f"left out in all: {len(left_out)}; {out}/_left_out.jsonl names them")  # noqa: T201
    return 0


def _limit(option: str, value: float | None, unit: int, default: int) -> int:
    if value is None:
        return default
    if not 0 < value < float("inf"):
        raise ConfigError(f"{option} is {value}; expected a number above 0.")
    return max(1, round(value * unit))


@contextmanager
def _shown() -> Iterator[Callable[["EmbedProgress"], None]]:
    """Yield what shows progress on stderr: a bar on a terminal, elsewhere a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    note = TextColumn("{task.fields[note]}")
    with Progress(BarColumn(40), MofNCompleteColumn(), note, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=None, note="loading")
        said = time.monotonic()

        def show(progress: "EmbedProgress") -> None:
            nonlocal said
            bars.update(bar, total=progress.total, completed=progress.done, note=describe(progress))
            is_worth_it = progress.done == progress.total or (progress.before and not progress.done)
            if not console.is_terminal and (is_worth_it or time.monotonic() - said >= SAY_EVERY_S):
                said = time.monotonic()
                words = filter(None, (f"{progress.done} of {progress.total}", describe(progress)))
                print(", ".join(words), file=sys.stderr, flush=True)  # noqa: T201

        yield show


def describe(progress: "EmbedProgress") -> str:
    """Say how fast a run is, and how long the rest takes."""
    if progress.seconds_left is None:
        return f"{progress.before} done before" if progress.before else ""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
    return f"{progress.rate:.1f} pictures a second" + (f", {left} left" if progress.done < progress.total else "")
