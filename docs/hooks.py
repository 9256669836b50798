"""Point links that leave docs/ at the repository, when MkDocs builds the site.

A page links to `../CONTRIBUTING.md` as GitHub wants it. The site has no such page, so it links to the file on GitHub.
"""

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"\]\((\.\./[^)#\s]+)")
"""The start of a Markdown link, as far as the anchor. Pages lie in docs/ itself, so that `../` leaves it."""


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of a page that lead out of docs/. Raises FileNotFoundError if a file does not exist."""
    root = Path(config.docs_dir).parent
    repository = config.extra["repository"]

    def rewrite(link: re.Match[str]) -> str:
        path = (root / page.file.src_path).parent / link[1].removeprefix("../")
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {link[1]}, which does not exist")
        kind = "tree" if path.is_dir() else "blob"
        return f"]({repository}/{kind}/main/{path.relative_to(root)}"

    return OUTSIDE.sub(rewrite, markdown)
