"""Turn the evidence of a check into one HTML page for a deployment review, with its pictures.

The tokens of all images would not fit into memory. The report keeps those of the best and the worst photographs, and
only the cosines of every other image.

Letters: S pixels a side, P prefix tokens, N patches, D features a token.
"""

import math
import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Certificate, describe_figure
from trtower.errors import BundleError, ConfigError, InputError
from trtower.extras import import_extra
from trtower.parity.bounds import DRAWN, PHOTOGRAPH
from trtower.spec import TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.evidence import ImageEvidence
from trtower_export.check.layers import first_jump
from trtower_export.check.policy import PolicyCheck
from trtower_export.check.report.page import Pictures, render
from trtower_export.check.report.pca import PcaRow, draw_strips, strip_png, token_distances, worst_tokens
from trtower_export.check.report.plots import TokenDistances, draw_layers, draw_tokens

PAGE = "report.html"
LAYERS, TOKENS = "report-layers.png", "report-tokens.png"
OURS = re.compile(r"report-(layers|tokens|(worst|best)-\d+)\.png")
"""Pictures of an earlier report, which a new one deletes. Nothing else in the folder is touched."""

PANEL = 370
"""Width and height of a panel, in pixels."""

MARKED = 5
"""How many of the worst patches to outline in a photograph."""


OWN = "PyTorch's own, photographs"
KINDS = {"photographs": PHOTOGRAPH, "drawn images": DRAWN}
"""The labels in the plot of the tokens, and the kinds of images that bounds are set for."""


class Report:
    """Collects evidence image by image with `see`, and writes the page at the end.

    ``processor`` prepared the pixels; the report undoes its normalisation. The page shows the ``keep`` best and the
    ``keep`` worst photographs. Raises ConfigError if the tower returns no grid of tokens that could be drawn, and
    MissingExtraError if matplotlib or jinja2 is not installed.
    """

    def __init__(self, spec: TowerSpec, processor: ImageProcessor, *, keep: int = 3) -> None:
        for module in ("matplotlib", "jinja2"):
            import_extra(module, extra="report", purpose="a report")
        if spec.grid is None:
            what = spec.head.describe() if spec.head else "tower"
            raise ConfigError(f"--report draws a grid of tokens, but this bundle returns the {what}: leave it out.")
        self._spec, self._processor, self._keep = spec, processor, keep
        self._worst: list[tuple[float, PcaRow]] = []  # with 1 - cosine of the worst token
        self._best: list[tuple[float, PcaRow]] = []
        self._distances: dict[str, list[Tensor]] = {label: [] for label in (*KINDS, OWN)}  # 1 - cosine, by image

    def see(self, evidence: ImageEvidence) -> None:
        """Add one image. Its tokens are kept only while it is among the best or the worst photographs."""
        distances = token_distances(evidence.bundle, evidence.reference)
        if evidence.kind != PHOTOGRAPH:
            self._distances["drawn images"].append(distances.float())
            return
        self._distances["photographs"].append(distances.float())
        self._distances[OWN].append(token_distances(evidence.torch, evidence.reference).float())
        worst = float(distances.nan_to_num(nan=torch.inf).max())
        row = make_row(evidence, self._spec, self._processor, describe_worst(distances, self._spec))
        self._worst = sorted([*self._worst, (worst, row)], key=lambda one: -one[0])[: self._keep]
        self._best = sorted([*self._best, (worst, row)], key=lambda one: one[0])[: self._keep]

    def write(self, folder: Path, bundle: Bundle, policy: PolicyCheck | None = None) -> Path:
        """Write the page and its pictures into ``folder``, replacing an earlier report, and return the page's path.

        ``policy`` are the actions of a policy with the bundle, if they were compared.

        Raises BundleError if the bundle has no certificate, InputError if ``folder`` cannot be created.
        """
        certificate = bundle.manifest.certificate
        if certificate is None:
            raise BundleError(f"{bundle.path} has no certificate to report: run trtower check {bundle.path} first.")
        make_folder(folder)
        worst, best = self._pictures(certificate)
        plots = {}
        if any(each.isfinite().any() for label in KINDS for each in self._distances[label]):
            plots[TOKENS] = self._draw_tokens(certificate)
        jump = first_jump(certificate.layers)
        if certificate.layers:
            plots[LAYERS] = draw_layers(
                certificate.layers,
                num_layers=self._spec.num_layers,
                torch_label=f"PyTorch {bundle.manifest.precision.upper()}",
                read=self._spec.layers,
                limit=_limit(certificate, "relative_error", PHOTOGRAPH),
                first_jump=jump.layer if jump else None,
            )
        page = render(
            bundle.manifest,
            certificate,
            worst=worst,
            best=best,
            layers=plots.get(LAYERS),
            tokens=plots.get(TOKENS),
            jump=jump,
            policy=policy,
        )
        for path in folder.iterdir():
            if OURS.fullmatch(path.name):
                path.unlink()
        for group, pictures in (("worst", worst), ("best", best)):
            plots |= {f"report-{group}-{place}.png": png for place, (_, png) in enumerate(pictures, 1)}
        for name, png in plots.items():
            (folder / name).write_bytes(png)
        (folder / PAGE).write_text(page, encoding="utf-8")
        return folder / PAGE

    def _pictures(self, certificate: Certificate) -> tuple[Pictures, Pictures]:
        """Draw the worst photographs, worst first, and the best ones that are not among them."""
        worst = [row for _, row in self._worst]
        rows = worst + [row for _, row in self._best if row not in worst]
        if not rows:
            return [], []
        limit = _limit(certificate, "token_cosine_min", PHOTOGRAPH, distance=True) or 1e-3
        strips = draw_strips(rows, panel=PANEL, mark=MARKED, limit=limit)
        pictures = [(row, strip_png(strip)) for row, strip in zip(rows, strips, strict=True)]
        return pictures[: len(worst)], pictures[len(worst) :]

    def _draw_tokens(self, certificate: Certificate) -> bytes:
        return draw_tokens(
            [
                TokenDistances(
                    label=label,
                    values=torch.cat(distances).numpy(),
                    limit=_limit(certificate, "token_cosine_min", KINDS.get(label, ""), distance=True),
                )
                for label, distances in self._distances.items()
                if distances
            ]
        )


def make_folder(folder: Path) -> None:
    """Create the folder of a report, or raise InputError. The command does so before a check, which takes minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        raise InputError(f"{folder} is a file or inside one, but a report needs a folder: name another.") from err
    except OSError as err:
        raise InputError(f"cannot create the report's folder {folder}: {err.strerror}. Name another folder.") from err


def describe_worst(distances: Tensor, spec: TowerSpec) -> str:
    """Describe the worst token of an image and its cosine; if it is a prefix token, also the worst patch."""
    prefix, side = grid_of(spec)
    token = next(iter(worst_tokens(distances, 1)), None)
    if token is None:
        return "every token equals PyTorch's"
    if not distances.isfinite().any():
        return "no token is finite"
    patch = next(iter(worst_tokens(distances[prefix:], 1)), None)

    def cosine(index: int) -> str:
        distance = float(distances[index])
        return describe_figure(1 - distance if math.isfinite(distance) else None)

    place = "none, every patch equals PyTorch's"
    if patch is not None:
        row, column = divmod(patch, side)
        place = f"row {row}, column {column}, cosine {cosine(prefix + patch)}"
    if token >= prefix:
        return f"worst token: {place}"
    return f"worst token: prefix token {token}, cosine {cosine(token)}; worst patch: {place}"


def grid_of(spec: TowerSpec) -> tuple[int, int]:
    """Return the tokens before the grid of what a tower returns, and the grid's side."""
    assert spec.grid is not None  # noqa: S101 - Report refuses a tower without one
    return spec.grid


def make_row(evidence: ImageEvidence, spec: TowerSpec, processor: ImageProcessor, caption: str) -> PcaRow:
    """Collect what the picture of one image shows. Clone the tokens, so that their batch can be freed."""
    prefix, _ = grid_of(spec)
    return PcaRow(
        name=evidence.name,
        image=as_image(evidence.pixel_values, processor),
        reference=evidence.reference[prefix:].clone(),
        bundle=evidence.bundle[prefix:].clone(),
        caption=caption,
    )


def as_image(pixel_values: Tensor, processor: ImageProcessor) -> Image.Image:
    """Undo the normalisation, to show what the tower received: (3, S, S) -> S x S."""
    pixels = pixel_values.detach().float().cpu()
    if processor.do_normalize:
        mean, std = (
            torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )
        pixels = pixels * std + mean
    if processor.do_rescale:
        pixels = pixels / processor.rescale_factor
    return Image.fromarray(pixels.nan_to_num().round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def _limit(certificate: Certificate, figure: str, images: str, *, distance: bool = False) -> float | None:
    """Find the limit of a figure, as 1 - cosine if ``distance`` is set; None if the figure has no bound."""
    for bound in certificate.bounds:
        if bound.figure == figure and bound.images == images:
            return 1 - bound.limit if distance else bound.limit
    return None
