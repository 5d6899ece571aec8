"""The site of docs/ is built without warnings, has every page, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import landmark

pytest.importorskip("mkdocs", reason="needs the extra docs")

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md"))
# Elements that make a browser load something, and the attributes that say what.
LOADS = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "object": ("data",),
    "use": ("href", "xlink:href"),
}


class Loaded(HTMLParser):
    """Collects what a page loads."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "prev", "next"):
            return
        self.addresses += [given[name] for name in LOADS.get(tag, ()) if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def html_of(site, page):
    return (site / page.name.replace("README", "index")).with_suffix(".html")


def test_every_page_is_there_and_in_the_navigation(site):
    start = (site / "index.html").read_text()
    for page in PAGES:
        html = html_of(site, page)
        assert html.is_file()
        assert html.name == "index.html" or f'href="{html.name}"' in start


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for html in pages:
        reader = Loaded()
        reader.feed(html.read_text())
        assert reader.addresses
        for address in reader.addresses:
            assert not re.match(r"(https?:)?//", address), f"{html.name} loads {address}"
    for style in site.rglob("*.css"):
        found = re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", style.read_text())
        assert found == [], f"{style.name} loads {found}"


def test_the_parser_finds_what_is_loaded():
    reader = Loaded()
    reader.feed('<script src="https://a.b/c.js"></script><link rel="stylesheet" href="//a.b/d">')
    assert reader.addresses == ["https://a.b/c.js", "//a.b/d"]


def test_every_public_name_is_on_the_page_of_the_api(site):
    page = (site / "api.html").read_text()
    for name in set(landmark.__all__) - {"__version__"}:
        assert f'id="landmark.{name}"' in page


def test_formulas_are_shown_without_a_script(site):
    for name in ("mathematics", "kernels", "evaluation"):
        page = (site / f"{name}.html").read_text()
        assert "<math" in page and "arithmatex" not in page


def test_both_palettes_have_their_picture(site):
    page = (site / "index.html").read_text()
    assert 'data-md-color-scheme="default"' in page and 'data-md-color-scheme="slate"' in page
    assert "picture-light.svg#only-light" in page and "picture-dark.svg#only-dark" in page


def test_the_picture_is_what_its_script_draws():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import picture
    finally:
        sys.path.remove(str(ROOT / "docs"))
    for name, colours in (("light", picture.LIGHT), ("dark", picture.DARK)):
        drawn = (ROOT / "docs" / f"picture-{name}.svg").read_text(encoding="utf-8")
        assert drawn == picture.draw(colours), "run make picture"
    assert picture.best_blocks() == [1, 3]
