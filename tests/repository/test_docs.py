"""The documentation site builds strict and offline, names all that is public, has no dead link."""

import inspect
import os
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import lars_fused
from lars_fused import conventions, distributed, monitor, options

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# A process that tries to reach another machine fails instead; sockets of this machine are none.
OFFLINE = """
import socket

def refuse(*args, **kwargs):
    raise OSError("the site must be built without a network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    folder, blocker = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("offline")
    (blocker / "sitecustomize.py").write_text(OFFLINE, encoding="utf-8")
    path = [str(blocker), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        # Not --quiet: warnings that are not shown are not counted either.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what a browser fetches to show it."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.fetched.append(found["src"])
        if tag == "link" and found.get("rel") != "canonical" and found.get("href"):
            self.fetched.append(found["href"])


@pytest.fixture(scope="module")
def pages(site):
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def public_names():
    names = [f"lars_fused.{name}" for name in lars_fused.__all__]
    names += [f"lars_fused.conventions.{name}" for name in conventions.__all__]
    names += [f"lars_fused.distributed.{name}" for name in distributed.__all__]
    names += [f"lars_fused.monitor.{name}" for name in monitor.__all__]
    for name, value in vars(options).items():
        own = not (inspect.isclass(value) or inspect.isfunction(value)) or (
            value.__module__ == options.__name__
        )
        if own and not name.startswith("_") and not inspect.ismodule(value) and name != "Any":
            names.append(f"lars_fused.options.{name}")
    return [n for n in names if n.rpartition(".")[2] not in IMPORTED]


# Names of typing that have no module of their own.
IMPORTED = {"Annotated", "Callable", "Mapping", "Sequence"}


def test_every_public_name_is_in_the_reference(pages):
    names = public_names()
    assert {"lars_fused.LARS", "lars_fused.options.TABLE", "lars_fused.conventions.MAE"} <= {*names}
    assert [name for name in names if name not in pages["reference.html"].ids] == []


def test_every_public_method_and_field_is_in_the_reference(pages):
    for owner in (lars_fused.LARS, lars_fused.LayerStats, distributed.NoiseScale):
        where = f"{owner.__module__}.{owner.__qualname__}"
        public = (
            f"lars_fused.{'distributed.' if 'distributed' in where else ''}{owner.__qualname__}"
        )
        for name, value in vars(owner).items():
            if not name.startswith("_") and getattr(value, "__doc__", None):
                ids = pages["reference.html"].ids
                assert {f"{public}.{name}", f"{where}.{name}"} & ids, name


def test_no_link_is_dead(site, pages):
    dead = []
    for name, page in pages.items():
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            path = unquote(parts.path)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            target = name if not path else target
            anchors = pages[target].ids if target in pages else None
            missing_anchor = anchors is not None and parts.fragment not in {"", "__skip", *anchors}
            if not (site / target).exists() or missing_anchor:
                dead.append((name, link))
    assert dead == []


def test_links_into_the_repository_lead_to_files(pages):
    inside = re.search(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    paths = {
        link.removeprefix(f"{inside}/blob/main/").partition("#")[0]
        for page in pages.values()
        for link in page.links
        if link.startswith(f"{inside}/blob/main/")
    }
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_a_browser_fetches_nothing_from_elsewhere(pages):
    elsewhere = {
        (name, address)
        for name, page in pages.items()
        for address in page.fetched
        if urlsplit(address).netloc
    }
    assert elsewhere == set()


def test_plugins_that_fetch_are_off():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    plugins = text.split("\nplugins:")[1].split("\n\n")[0]
    assert re.findall(r"^  - (\w+)", plugins, re.MULTILINE) == ["search", "mkdocstrings"]
    assert "enable_inventory: false" in plugins
    assert "font: false" in text


def test_the_address_of_the_repository_stands_once():
    address = re.search(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    files = [ROOT / "mkdocs.yml", ROOT / "CITATION.cff", ROOT / "SECURITY.md", ROOT / "setup.py"]
    files += [*DOCS.rglob("*.md"), *(ROOT / ".github").rglob("*.*"), *DOCS.rglob("*.py")]
    counts = {f.name: f.read_text(encoding="utf-8").count(address) for f in files if f.is_file()}
    assert {name: n for name, n in counts.items() if n} == {"setup.py": 1}


def test_the_drawings_are_those_that_the_script_draws():
    scope = {"__file__": str(DOCS / "tools" / "drawings.py"), "__name__": "drawings"}
    exec((DOCS / "tools" / "drawings.py").read_text(encoding="utf-8"), scope)
    files = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("drawings/*.svg")}
    drawn = {name: draw() for name, draw in scope["DRAWINGS"].items()}
    assert drawn == files, "run `python docs/tools/drawings.py`"


def test_the_table_of_conventions_is_that_of_the_code():
    text = (DOCS / "equations.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip().strip("`") for cell in line] for line in lines]
    missing = {*conventions.__all__} - {*header[1:]}
    assert not missing, f"add a column for {missing} to docs/equations.md"
    assert sorted(header[1:]) == conventions.__all__
    for column, name in enumerate(header[1:], start=1):
        shown = {row[0]: row[column] for row in rows}
        values = {
            k: f"{v:g}" if type(v) is float else str(v)
            for k, v in getattr(conventions, name).items()
        }
        assert shown == {k: "1e-8" if v == "1e-08" else v for k, v in values.items()}, name
