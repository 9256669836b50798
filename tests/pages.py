"""Read Markdown pages: their code blocks, commands, links and anchors."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    *DOCS,
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "hopper.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "clients" / "README.md",
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")


def name_of(page: Path) -> str:
    """Name a page as a reader does, from the top of the repository."""
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(language: str, text: str) -> list[str]:
    return [code for written, code in _FENCE.findall(text) if written == language]


def prose(text: str) -> str:
    """Leave the code blocks out."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """List what the prose has in backticks."""
    return _SPAN.findall(prose(text))


def shell_lines(text: str) -> list[str]:
    """List the commands of the `sh` blocks, one a line, without comments and prompts."""
    lines = "\n".join(blocks("sh", text)).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def commands(program: str, text: str) -> list[list[str]]:
    """List the arguments of every call of a program in the `sh` blocks, pipes and redirections left out."""
    calls = []
    for line in shell_lines(text):
        for part in re.split(r"\s*(?:&&|\|\||[|;])\s*", line):
            words = shlex.split(re.split(r"\s\d?>", part)[0])
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == program:
                calls.append(words[1:])
    return calls


def links(text: str) -> list[str]:
    """List where the prose links to within the repository, images included."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _SPAN.sub("", prose(text)))
    return [target for target in targets if not re.match(r"https?:|mailto:", target)]


def anchors(text: str) -> set[str]:
    """List the anchors that GitHub and the site give a page: of its headings, and of what api.md documents."""
    return {*_heading_anchors(text), *re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)}


def _heading_anchors(text: str) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug
        seen[slug] += 1
