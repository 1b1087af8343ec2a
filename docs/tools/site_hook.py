"""What the site needs beyond mkdocs: pages and links that lie outside of docs/.

README files stay beside the code that they describe. The site shows those in `SHOWN` under
`repository/`, and a relative link to any other file of the repository leads to that file at the
repository's address. A link to a file that does not exist ends the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    "kernels/README.md",
    "tests/README.md",
)
PREFIX = "repository/"
_URL = re.compile(r'^REPOSITORY = "([^"]+)"$', re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_PICTURES = (".png", ".svg")


def repository_url() -> str:
    """The address of the repository; setup.py is where it is stated."""
    found = _URL.search((ROOT / "setup.py").read_text(encoding="utf-8"))
    assert found is not None, "setup.py states no REPOSITORY"
    return found[1]


def repository_path(src_uri: str) -> str:
    """Where a page or picture of the site lies in the repository."""
    return src_uri[len(PREFIX) :] if src_uri.startswith(PREFIX) else f"docs/{src_uri}"


def site_path(path: str) -> str | None:
    """Where a file of the repository lies in the site; None if the site does not have it."""
    if path.startswith("docs/"):
        return path[len("docs/") :]
    return PREFIX + path if path in SHOWN or path.endswith(_PICTURES) else None


def targets(markdown: str, page: str) -> list[str]:
    """The files of the repository to which a page's relative links lead, dead ones too."""
    texts = _CODE.split(markdown)[::2]
    links = [link for text in texts for _, link, _ in _LINK.findall(text)]
    return [_resolve(link, page) for link in links if not _has_scheme(link)]


def rewritten(markdown: str, page: str, url: str) -> str:
    """A page's Markdown with its relative links led to where the site or repository has them."""

    def lead(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        if _has_scheme(link):
            return match[0]
        target = _resolve(link, page)
        there = site_path(target)
        if there is not None and not (ROOT / target).is_dir():
            link = posixpath.relpath(there, posixpath.dirname(site_path(page) or ""))
        elif (ROOT / target).exists():
            link = f"{url}/blob/main/{target}"
        else:
            raise PluginError(f"{page}: the link {link} leads to no file")
        return before + link + after

    # `a[0]['b']` in a text is no reference to a definition "'b'".
    parts = _CODE.split(markdown)
    return "".join(
        p if i % 2 else _LINK.sub(lead, p.replace("][", "]\\[")) for i, p in enumerate(parts)
    )


def _has_scheme(link: str) -> bool:
    return re.match(r"[a-z]+:", link) is not None


def _resolve(link: str, page: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def on_config(config: Any) -> Any:
    """mkdocs: before anything is read."""
    config.repo_url = repository_url()
    return config


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: the files of the site. Adds the pages outside of docs/ and their pictures."""
    pages = [repository_path(f.src_uri) for f in files.documentation_pages()]
    outside = {*SHOWN}
    for page in (*pages, *SHOWN):
        text = (ROOT / page).read_text(encoding="utf-8")
        outside |= {
            t
            for t in targets(text, page)
            if t.endswith(_PICTURES) and not t.startswith("docs/") and (ROOT / t).is_file()
        }
    for path in sorted(outside):
        files.append(File.generated(config, PREFIX + path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs: a page before it is turned into HTML."""
    return rewritten(markdown, repository_path(page.file.src_uri), config.repo_url)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs: a page's HTML. Docstrings introduce equations by `::`, unknown to Markdown."""
    return html.replace("::</p>", ":</p>")
