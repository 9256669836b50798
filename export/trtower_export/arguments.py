"""The options of the export side's commands, and how to read what was typed after them.

A value that cannot be read raises a ConfigError that names the option; an empty one raises typer.BadParameter.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from trtower.cli import read_numbers
from trtower.errors import ConfigError
from trtower.extras import import_extra
from trtower.flavour import FLAVOURS
from trtower.head import HEADS, NO_HEAD, POOLS
from trtower.layer_codes import FEATURE_CODES
from trtower.names import list_choices
from trtower.spec import DEFAULT_BATCH, EIGHT_BIT, HALVES, LAYOUTS, PIXELS, PRECISIONS, BatchProfile
from trtower_export.options import AUTO
from trtower_export.recipes import all_recipes
from trtower_export.targets import all_targets


def complete(choices: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Make the shell completion of an option that accepts these choices, or several separated by commas."""

    def matching(incomplete: str) -> list[str]:
        typed, comma, last = incomplete.rpartition(",")
        return [typed + comma + choice for choice in choices() if choice.startswith(last)]

    return matching


def _backends() -> Iterable[str]:
    from trtower.runners.choose import backend_names  # torch

    return backend_names()


def not_empty(text: str) -> str:
    """Refuse an empty value, which is usually a shell variable that is not set."""
    if not text:
        raise typer.BadParameter("it is empty; give a value (an option can also be left out).")
    return text


def read_path(text: str | Path) -> Path:
    """Read a path. An empty one would silently be the current folder."""
    return Path(not_empty(str(text)))


CheckpointArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Hub id, local folder (Hugging Face, LLaVA or VILA), OpenCLIP file, or the name of a recipe.",
        autocompletion=complete(lambda: (recipe.name for recipe in all_recipes())),
    ),
]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.", parser=read_path)]
SelectLayerOption = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        help="Hidden states to read: one as -2, several as -2,-5,6, or last_hidden_state. "
        "Default: the checkpoint's, else the recipe's, else -2.",
    ),
]
SelectFeatureOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Tokens to keep: patch, cls_patch, or a slice of LLaVA-NeXT. "
        "Default: the checkpoint's, else the recipe's, else patch.",
        autocompletion=complete(lambda: FEATURE_CODES),
    ),
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="PIXELS",
        help="Side of the square input in pixels; positions are interpolated. "
        "Default: the recipe's, else the checkpoint's.",
    ),
]
PixelsOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What the engine takes: float, prepared pixels, or uint8, bytes that it rescales and normalises itself.",
        autocompletion=complete(lambda: PIXELS),
    ),
]
LayoutOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="nchw, or with --pixels uint8 also nhwc, (B, S, S, 3): pictures as decoders give them.",
        autocompletion=complete(lambda: LAYOUTS),
    ),
]
HeadOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What ends the engine: none (hidden states), the model's projector, or embedding (one vector an image).",
        autocompletion=complete(lambda: (NO_HEAD, *HEADS)),
    ),
]
NormalizeOption = Annotated[
    bool, typer.Option("--normalize", help="With --head embedding: vectors of length 1, as cosine similarity needs.")
]
PoolOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="With --head embedding of a DINO: cls, or cls_mean, which adds the mean of the patches. Default: cls.",
        autocompletion=complete(lambda: POOLS),
    ),
]
BatchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--batch",
        metavar="MIN,OPT,MAX",
        help="Images per engine call: the fewest, the number to tune for, and the most. N means 1,N,N. Repeat for "
        f"several profiles. Default: the recipe's, else {DEFAULT_BATCH.min},{DEFAULT_BATCH.opt},{DEFAULT_BATCH.max}.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"{list_choices([*PRECISIONS, AUTO])}. auto is fp16 with as few operations in fp32 as the check's "
        "bounds allow; it searches on --images.",
        autocompletion=complete(lambda: (AUTO, *PRECISIONS)),
    ),
]
KeepFp16Option = Annotated[
    str | None,
    typer.Option(
        "--keep-fp16",
        metavar="NAMES",
        help=f"Layers to keep in FP16 with {list_choices(EIGHT_BIT)}, separated by commas; * is a wildcard.",
    ),
]
FlavourOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Plan to build: tensorrt (on the GPU that will run it), tensorrt-rtx (on any machine), none, or auto "
        "(what this machine can build).",
        autocompletion=complete(lambda: (AUTO, "none", *FLAVOURS)),
    ),
]
BuildFlavourOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="tensorrt, tensorrt-rtx, or auto (what this machine can build).",
        autocompletion=complete(lambda: (AUTO, *FLAVOURS)),
    ),
]
CapabilityOption = Annotated[
    list[str] | None,
    typer.Option(
        "--compute-capability",
        metavar="X.Y",
        help="Compute capabilities to build for, as in 8.9 or 8.6,8.9. Can be repeated. Default: a portable plan with "
        "tensorrt-rtx (fp8: one for 8.9 and later), this machine's GPU with tensorrt.",
    ),
]
StoreOption = Annotated[
    bool, typer.Option("--store/--no-store", help="Keep built plans in the user's cache, and reuse them.")
]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit on the hub.", parser=not_empty)
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="SOURCE",
        help="Where the weights are now. Default: where they were at export.",
        parser=not_empty,
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Backend to run the bundle on, as for VisionTower.load.",
        autocompletion=complete(_backends),
    ),
]
CheckBackendOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Backend to run the bundle on; or emulated-fp16, which rounds wherever a GPU could.",
        autocompletion=complete(lambda: (*_backends(), *(f"emulated-{name}" for name in HALVES))),
    ),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of images to run the tower on. Default: the demo extra's photographs.",
        parser=read_path,
    ),
]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights. They can run their author's code.")
]
RemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python code.")]
TowerOption = Annotated[
    str | None,
    typer.Option("--tower", metavar="NAME", help="Which tower, if the checkpoint has several.", parser=not_empty),
]
ExportedTowerOption = Annotated[
    str | None,
    typer.Option(
        "--tower",
        metavar="NAME",
        help="Which tower, if the checkpoint has several. Default: the exported one.",
        parser=not_empty,
    ),
]
KeepFp32Option = Annotated[
    str | None,
    typer.Option(
        "--keep-fp32",
        metavar="NAMES",
        help="Operations to keep in FP32, as `doctor` names them: 'layers.3.mlp,layers.*.norm1'.",
    ),
]
RandomWeightsOption = Annotated[
    bool,
    typer.Option(
        "--random-weights", help="Rehearse without the weights. Size, build time and latency are the real ones."
    ),
]
ErrorImagesOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Measure each operation's own rounding error on the N hardest images (0 skips it). Costs half a "
        "forward pass per operation, image and precision (FP16 and BF16).",
    ),
]
OptimizationLevelOption = Annotated[
    int | None,
    typer.Option(
        metavar="0-5", help="How long TensorRT searches for faster kernels, 0 to 5. Default: TensorRT's own, 3."
    ),
]
HardwareCompatibleOption = Annotated[
    bool,
    typer.Option("--hardware-compatible", help="Build for every GPU from Ampere on; slower. Only for tensorrt."),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Deployment to export for, such as jetpack-6.2 or l4; `trtower targets` lists them.",
        parser=not_empty,
        autocompletion=complete(lambda: tuple(target.name for target in all_targets())),
    ),
]
KnownFaultOption = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-known-fault", metavar="NAME", help="Go on in spite of a known fault of TensorRT. Repeatable."
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for the bundle. Default: engines/NAME.", parser=read_path),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="POLICY",
        help="Also act with this policy of LeRobot (folder or hub id), with the bundle and without it, joint by joint.",
        parser=read_path,
    ),
]
ObservationsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What the policy acts on: its inputs as safetensors, N of each. Default: 4 that are drawn.",
        parser=read_path,
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Write a page with pictures into this folder. Implies --by-layer.", parser=read_path
    ),
]
PictureOption = Annotated[
    Path | None,
    typer.Option(metavar="PNG", help="Draw layers by operations into this file.", parser=read_path),
]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="PNG", help="Draw the results into this file.", parser=read_path)
]
DemoOutOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder for the bundles and the picture.", parser=read_path)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check_png(path: Path, option: str) -> None:
    """Raise ConfigError unless ``path`` is a PNG that can be written, MissingExtraError if nothing can draw it."""
    if path.is_dir() or not path.parent.is_dir() or path.suffix.lower() != ".png":
        raise ConfigError(f"{option} {path} cannot be written: expected a .png in an existing folder.")
    import_extra("matplotlib", extra="report", purpose=option)


def read_profile(text: str) -> BatchProfile:
    """Read MIN,OPT,MAX, or one number N, which means 1,N,N."""
    numbers = read_numbers(text)
    if len(numbers) == 1:
        numbers = [1, *numbers * 2]
    if len(numbers) != 3:
        raise ConfigError(
            f"--batch {text}: expected MIN,OPT,MAX, such as 1,8,32, or one number, the maximum; repeat --batch for "
            "several profiles."
        )
    return BatchProfile(min=numbers[0], opt=numbers[1], max=numbers[2])


def read_names(text: str) -> tuple[str, ...]:
    """Read names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
