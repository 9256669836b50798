"""Get a checkpoint's files from a local folder, the hub or its cache, each only when it is needed."""

import json
import logging
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from trtower.errors import CheckpointError
from trtower_export.recipes import all_recipes

HUB_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)

_KNOWN = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one checkpoint, in ``folder``. Those on the hub (``repo``) must be fetched first.

    For a folder inside a repository, ``inside`` is what the names of its files begin with there.
    """

    folder: Path
    repo: str | None = None
    revision: str | None = None
    offline: bool = False
    inside: str = ""

    def fetch(self, *patterns: str) -> None:
        """Download the matching files into ``folder``; skip those that the repository does not have.

        A pattern without a slash matches only in the top folder. Raises CheckpointError if the download fails.
        """
        if self.repo is not None:
            names = [f"{self.inside}{pattern}" for pattern in patterns]
            _snapshot(self.repo, self.revision, names, offline=self.offline)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object; return None if there is no such file."""
        path = self.folder / name
        if not path.exists():
            return None
        check_arrived(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as err:
            raise CheckpointError(f"{path} is not JSON: {first_line(err)}") from err
        if not isinstance(data, dict):
            raise CheckpointError(f"{path} holds a {type(data).__name__}; expected a JSON object.")
        return data

    def inner(self, name: str) -> "Files":
        """Return the files of a folder inside this one, with its configs fetched."""
        files = replace(self, folder=self.folder / name, inside=f"{self.inside}{name}/")
        files.fetch("*.json")
        return files


def expanded(path: str) -> Path:
    """Expand a path as the shell does; raise CheckpointError if it is too long or names an unknown user's home."""
    try:
        result = Path(path).expanduser()
        result.is_dir()
    except (OSError, RuntimeError) as err:
        raise CheckpointError(f"{path} is not a folder: {first_line(err)}.") from err
    return result


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_arrived(path: Path) -> None:
    """Raise CheckpointError if a failed download left a pointer, a web page or nothing instead of the file."""
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as err:
        raise CheckpointError(f"{path} could not be read: {first_line(err)}.") from err
    if head == LFS_POINTER:
        raise CheckpointError(
            f"{path} is a git-lfs pointer and not the file itself: run `git lfs pull` in {path.parent}."
        )
    if head[:9].lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page and not the file itself: download it again.")
    if not head:
        raise CheckpointError(f"{path} is empty: download it again.")


def download(repo: str, revision: str | None) -> Files:
    """Find a repository on the hub, or in its cache if the hub cannot be reached, and fetch its configs.

    Raises CheckpointError if it is in neither.
    """
    if repo.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{repo} is not a folder. Name a folder with a model, an OpenCLIP file, or a hub id such as {_KNOWN}. If "
            "the weights of a bundle have moved since its export, name their new place with --checkpoint."
        )
    unreachable = None
    try:
        # Ask the hub first: snapshot_download has no time limit for a hub that accepts a connection and never answers.
        revision = HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except HFValidationError as err:
        raise CheckpointError(f"{repo} is neither a folder nor a hub id such as {_KNOWN}.") from err
    except HfHubHTTPError as err:
        raise CheckpointError(
            f"the hub refused {repo}: {first_line(err)}. Check its id and revision; if it is private or gated, run: "
            "hf auth login"
        ) from err
    except Exception as err:  # noqa: BLE001 - the hub's transport and its errors changed twice between releases
        unreachable = err
    try:
        folder = _snapshot(repo, revision, ["*.json"], offline=unreachable is not None)
    except CheckpointError:
        if unreachable is None:
            raise
        recipes = ", ".join(get_close_matches(repo, {recipe.checkpoint for recipe in all_recipes()}, cutoff=0))
        raise CheckpointError(
            f"{repo} is not a folder here, and the hub could not be reached ({first_line(unreachable)}). Either "
            "download it elsewhere and name its folder, or rehearse a checkpoint that has a recipe, such as "
            f"{recipes}, with --random-weights."
        ) from unreachable
    if unreachable:
        logger.warning("the hub could not be reached (%s): using the cached copy of %s", unreachable, repo)
    return Files(folder=folder, repo=repo, revision=revision, offline=unreachable is not None)


def _snapshot(repo: str, revision: str | None, patterns: list[str], *, offline: bool) -> Path:
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=None if any("/" in pattern for pattern in patterns) else ["*/*"],
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=offline,
        )
    except OSError as err:
        raise CheckpointError(f"{repo} could not be downloaded: {first_line(err)}") from err
    return Path(folder)


def first_line(err: BaseException) -> str:
    """Return the first line of another library's error, without its full stop."""
    lines = str(err).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(err).__name__
