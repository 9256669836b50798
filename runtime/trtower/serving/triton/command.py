"""The command `trtower triton`."""

from typing import Annotated

import typer


def triton(
    bundles: Annotated[list[str], typer.Argument(metavar="BUNDLES", help="Folders of bundles.")],
    out: Annotated[str, typer.Option(metavar="REPOSITORY", help="The model repository to write to.")],
    platform: Annotated[
        str, typer.Option(metavar="NAME", help="python runs the bundle through trtower, tensorrt_plan a plan.")
    ] = "python",
    backend: Annotated[str, typer.Option(metavar="NAME", help="Backend, as for VisionTower.load.")] = "auto",
    instances: Annotated[int, typer.Option(metavar="N", help="Towers side by side, on each GPU or the CPU.")] = 1,
    kind: Annotated[str, typer.Option(metavar="NAME", help="Where they run: auto, gpu or cpu.")] = "auto",
    max_queue_delay_ms: Annotated[
        float, typer.Option(metavar="MS", help="How long a request waits for others to run with.")
    ] = 0.0,
    max_queue_size: Annotated[int, typer.Option(metavar="N", help="Requests that wait at most; 0: no end.")] = 1024,
    timeout_ms: Annotated[
        float, typer.Option(metavar="MS", help="How long a request waits before it is refused; 0: no end.")
    ] = 0.0,
    version: Annotated[int, typer.Option(metavar="N", help="The version of the models.")] = 1,
    allow_uncertified: Annotated[
        bool, typer.Option("--allow-uncertified", help="Serve a bundle without a certificate, or a rehearsal.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a version that is there.")] = False,
) -> int:
    """Write a model repository for NVIDIA Triton.

    The server needs trtower with a backend beside it, unless it runs a plan. A bundle that takes bytes also gets a
    model NAME-encoded, which takes JPEGs.
    """
    from trtower.serving.triton.config import TritonOptions
    from trtower.serving.triton.repository import write_repository

    options = TritonOptions(
        platform=platform,
        backend=backend,
        instances=instances,
        kind=kind,
        max_queue_delay_ms=max_queue_delay_ms,
        max_queue_size=max_queue_size,
        timeout_ms=timeout_ms,
        allow_uncertified=allow_uncertified,
    )
    for model in write_repository(bundles, out, options, version=version, overwrite=overwrite):
        print(model)  # noqa: T201
    return 0
