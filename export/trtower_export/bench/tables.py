"""Print a benchmark as tables, and draw it as a plot."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trtower.runners import choose
from trtower.runners.race import UNEVEN
from trtower.spec import MB
from trtower_export.bench.entrants import LLAVA, TRTOWER
from trtower_export.bench.results import Benchmark, ColdStart, ListTiming, Timing
from trtower_export.console import new_table, print_whole, say
from trtower_export.drawing import BLUE, GREY, INK, ORANGE, RULE, new_figure, to_png

DPI = 200
WIDTH, ROW_HEIGHT, MARGIN = 1500, 60, 190
"""In pixels: the plot's width, the height per entrant, and the height of title and axis."""

LEFT = 0.34
"""The fraction of the plot's width for batches and names."""


def print_benchmark(console: Console, benchmark: Benchmark) -> None:
    """Print the race at each batch, the cold starts, who could not run, and the machine."""
    weights = ", random weights" if benchmark.bundle["random_weights"] else ""
    certified = "certified for this backend" if benchmark.bundle["certified"] else "not certified for this backend"
    say(console, f"{benchmark.bundle['path']}: {benchmark.bundle['precision']}{weights}, {certified}")
    print_whole(console, _race_table(benchmark.timings))
    ceilings = ", ".join(f"{name} {flops / 1e12:.3g} TFLOP/s" for name, flops in benchmark.ceilings.items())
    flop = benchmark.bundle["flop_an_image"] / 1e9
    say(console, f"{flop:.1f} GFLOP per image; ceiling (a large matrix product): {ceilings or 'not measured'}")
    print_whole(console, _cold_table(benchmark.cold))
    if benchmark.tiles:
        say(console, _describe_list(benchmark.tiles))
    uneven = max(benchmark.timings, key=lambda each: each.p99_s / each.median_s)
    longest = uneven.p99_s / uneven.median_s
    if longest > UNEVEN:
        busy = f"this machine was busy: {uneven.entrant} took up to {longest:.1f} times its median"
        say(console, f"{busy}; run the benchmark again on an idle machine")
    for name, reason in benchmark.absent.items():
        say(console, f"{name} did not run: {reason}")
    machine = benchmark.environment
    hardware = machine["gpu"]["name"] if "gpu" in machine else machine["processor"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    say(console, f"{hardware}, {machine['threads']} threads, {machine['date']}; {versions}")


def _race_table(timings: Sequence[Timing]) -> Table:
    names = ("entrant", "runs on", "computes in")
    figures = ("batch", "median ms", "p99 ms", "images/s", "of ceiling", "vs LLaVA", "rel. error")
    table = new_table(*names, *figures, left=names)
    for each in timings:
        table.add_row(
            each.entrant,
            each.runs_on,
            each.arithmetic,
            str(each.batch),
            f"{each.median_s * 1e3:.1f}",
            f"{each.p99_s * 1e3:.1f}",
            f"{each.images_per_s:.2f}",
            "" if each.share is None else f"{each.share:.0%}",
            "" if each.times_llava is None else f"{each.times_llava:.2f}x",
            "not finite" if each.error is None else f"{each.error:.1e}",
            style="bold" if each.entrant == TRTOWER else "",
        )
    return table


def _cold_table(cold: Sequence[ColdStart]) -> Table:
    table = new_table("cold start", "load s", "first call s", "peak MB", left=("cold start",))
    for each in cold:
        load = "n/a" if each.load_s is None else f"{each.load_s:.2f}"
        table.add_row(each.entrant, load, f"{each.first_s:.2f}", f"{each.peak_bytes / MB:.0f}")
    return table


def _describe_list(tiles: ListTiming) -> str:
    llava, ours = tiles.llava_s * 1e3, tiles.trtower_s * 1e3
    return (
        f"list of {tiles.images} images: LLaVA's loop {llava:.0f} ms, trtower {ours:.0f} ms, {llava / ours:.2f} times "
        f"as fast (medians of {tiles.rounds})"
    )


def draw_benchmark(benchmark: Benchmark) -> bytes:
    """Draw images per second as a PNG, with the entrants of each batch below one another."""
    timings = benchmark.timings
    height = MARGIN + ROW_HEIGHT * len(timings)
    figure: Any = new_figure(WIDTH, height, dpi=DPI, purpose="the plot of a benchmark")
    axes = figure.add_axes((LEFT, 110 / height, 0.94 - LEFT, 1 - MARGIN / height))
    colours = {TRTOWER: BLUE, LLAVA: ORANGE}
    bars = axes.barh(
        range(len(timings)),
        [each.images_per_s for each in timings],
        color=[colours.get(each.entrant, GREY) for each in timings],
        height=0.7,
    )
    labels = [_rate(each.images_per_s) + ("" if each.share is None else f", {each.share:.0%}") for each in timings]
    axes.bar_label(bars, labels, padding=4, fontsize=6, color=INK)
    axes.set_yticks(range(len(timings)), [label_entrant(each) for each in timings], fontsize=6)
    axes.set_ylim(len(timings) - 0.5, -0.5)
    _mark_batches(axes, [each.batch for each in timings])
    axes.tick_params(axis="x", labelsize=6)
    axes.margins(x=0.15)
    axes.set_xlabel(
        "images per second, and percent of the ceiling (a large matrix product on this machine)", fontsize=7, color=INK
    )
    hardware = benchmark.environment.get("gpu", {}).get("name") or benchmark.environment["processor"]
    axes.set_title(f"{benchmark.bundle['name']}, {hardware}, {benchmark.environment['date']}", fontsize=7, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def label_entrant(timing: Timing) -> str:
    """Label an entrant for the plot: its name, its arithmetic and, for trtower, the backend."""
    name = timing.entrant
    if name == TRTOWER:
        software = timing.runs_on.partition(" ")[0]  # the first word of the runner's name
        by_name = sorted(choose.BACKENDS, key=lambda backend: backend.name)
        product = next((backend.product for backend in by_name if backend.name.startswith(software)), software)
        name = f"trtower on {product}"
    return f"{name} ({timing.arithmetic})"


def _mark_batches(axes: Any, batches: Sequence[int]) -> None:
    """Label each batch beside its first row, and draw a line between batches."""
    left = 0.03 - LEFT / (0.94 - LEFT)  # in widths of the axes
    place = axes.get_yaxis_transform()  # x in widths, y in rows
    for row, batch in enumerate(batches):
        if row and batch == batches[row - 1]:
            continue
        axes.text(left, row, f"batch {batch}", transform=place, va="center", fontsize=6, weight="bold")
        if row:
            axes.axhline(row - 0.5, left, color=RULE, lw=1, clip_on=False)


def _rate(images_per_s: float) -> str:
    """Write three digits, or all digits before the point if there are more."""
    return f"{images_per_s:.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"
