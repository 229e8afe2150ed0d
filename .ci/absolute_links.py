"""Make the relative links of a Markdown page absolute: a package page has no files beside it.

``python .ci/absolute_links.py README.md https://HOST/OWNER/NAME TAG`` rewrites the file; the release workflow calls it.
"""

import re
import sys
from pathlib import Path


def absolute(text: str, repository: str, tag: str) -> str:
    """The page with every relative target of a link or an image in ``repository`` at ``tag``."""

    def replace(found: re.Match) -> str:
        before, target = found.groups()
        view = "raw" if target.lower().endswith((".gif", ".jpg", ".png", ".svg")) else "blob"
        return f"{before}{repository}/{view}/{tag}/{target}"

    return re.sub(r"(\]\(|<img[^>]+src=\")(?![a-z]+:|#)([^)\s\"]+)", replace, text)


if __name__ == "__main__":
    name, repository, tag = sys.argv[1:]
    page = Path(name)
    page.write_text(absolute(page.read_text("utf-8"), repository, tag), encoding="utf-8")
