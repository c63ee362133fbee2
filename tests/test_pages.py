"""The user's pages: parts that are made from results, tests and docstrings are up to date; links lead somewhere; what
is named is there."""

import ast
import pathlib
import re
import subprocess
import sys
import urllib.parse

import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / name) for name in ("scripts", "benchmarks")]

import api_page
import charts
import pages

PAGES = [*pages.PAGES, *sorted((ROOT / "docs" / "notes").glob("*.md"))]
OWN = ("README.md", "CARD.md", "support.md", "benchmarks.md", "usage.md", "troubleshooting.md", "api.md")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
NOT_YET = {"CONTRIBUTING.md", "CHANGELOG.md"}  # of others, who may come later


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda path: path.name)
def test_made_parts_are_up_to_date(page):
    """`make docs` writes them."""
    text = page.read_text()
    assert text.count(": begin -->") == text.count(": end -->") == len(pages.parts_of(text))
    assert pages.made(text) == text


def test_every_part_is_on_a_page():
    found = [name for page in pages.PAGES for name in pages.parts_of(page.read_text())]
    assert set(found) == set(pages.SECTIONS)
    assert found.count("figures") == found.count("in short") == 2 and found.count("requirements") == 3


def test_a_part_that_is_out_of_date_shows():
    readme = (ROOT / "README.md").read_text()
    for old in ("557 ms", "| torch | 2.11 |", "| DeepSpeed ZeRO-3; FSDP1 |"):
        assert readme.count(old) == 1
        assert pages.made(readme.replace(old, "new")) == readme


@pytest.mark.parametrize("chart", charts.charts(), ids=lambda chart: chart.name)
def test_pictures_show_the_results(chart):
    """What is drawn stands in the picture's metadata."""
    import html

    text = charts.path_of(chart).read_text()
    (described,) = re.findall(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
    assert html.unescape(described) == chart.figures
    assert any(f"images/{chart.name}.svg" in page.read_text() for page in PAGES)


def test_pictures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "IMAGES", tmp_path)
    for chart in charts.charts():
        charts.draw(chart)
        assert charts.path_of(chart).read_text().count("<path") > 20


def test_the_chart_has_the_figures_of_the_table():
    (chart,) = [chart for chart in charts.charts() if chart.name == "step"]
    case = chart.cases.index("LoRA\n4×2048")
    ms, gigabytes = chart.bars["lora-fused"][case]
    assert f"| 8B, LoRA, 4×2048 tokens | {ms:.0f} ms, {gigabytes:.1f} GB |" in (ROOT / "README.md").read_text()


# ---- links, and what is named ----


def links(text):
    return [
        link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http:", "https:", "mailto:"))
    ]


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        path, _, anchor = urllib.parse.unquote(link).partition("#")
        target = (page.parent / path) if path else page
        if target.name in NOT_YET and not target.exists():
            continue
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page.name}: {link} has no such heading"


def test_links_are_seen():
    assert sum(len(links(page.read_text())) for page in PAGES) > 25
    assert links("[a](b.md#c) [d](https://e) ![f](g.png)") == ["b.md#c", "g.png"]
    assert anchors("# What if not?\n```sh\n# no\n```\n## A `b`, c") == {"what-if-not", "a-b-c"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in OWN], ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    """Paths of this repository in code marks."""
    named = re.findall(
        r"`((?:tests|scripts|examples|docs|benchmarks|torch-ext|kernel-src)/[\w./-]+)`", page.read_text()
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
    assert len(named) > 30 or page.name != "support.md"


def test_make_targets_that_are_named_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES if page.name in OWN for name in re.findall(r"`make ([a-z-]+)", page.read_text())}
    assert {"demo", "test", "docs"} <= named <= targets


def test_make_help_lists_every_target():
    """On its page as well, which is made of the same lines."""
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    listed = re.findall(r"^\| `make ([a-z-]+)` \| \S.+ \|$", pages.targets(), re.MULTILINE)
    assert sorted(listed) == sorted(phony.replace("\\\n", " ").split())
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make ([a-z-]+)  ", shown, re.MULTILINE) == listed


def first_cells(title):
    """What is quoted in the first column of a table of docs/troubleshooting.md."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[1:]
    return [quote.strip(" .") for row in rows for quote in re.findall(r"`([^`]+)`", row)]


def said_in(*folders):
    """Every text in their sources, what is filled in left out."""
    sources = set()
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                sources.add("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                sources.add(node.value)
    return "\n".join(sources)


def assert_said(quotes, said):
    for quote in quotes:
        parts = [part for part in re.split(r"\.\.\.|\(|512|7\.5", quote) if len(part.strip()) > 3]
        assert all(part.strip(" .;)") in said for part in parts), quote


def test_every_reason_in_troubleshooting_is_one():
    """The words that `explain` would say."""
    quoted = first_cells("By what `explain` says")
    assert len(quoted) >= 20
    assert_said(quoted, said_in(api_page.PACKAGE))


def test_every_error_in_troubleshooting_is_one():
    """The words of this package or of `kernels`. httpx's are of a header, which no source of either has."""
    import kernels

    quoted = first_cells("Errors")
    quoted.remove("httpx.LocalProtocolError")
    named = {"ValueError"}
    assert len(quoted) >= 11 and named < set(quoted)
    assert_said(set(quoted) - named, said_in(api_page.PACKAGE, pathlib.Path(kernels.__file__).parent))


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    for page in PAGES:
        if page.name in OWN:
            prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
            long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")]
            assert long == [], page.name


def test_the_api_page_has_what_is_public(lora_fused):
    grouped = {name for _, names in api_page.GROUPS for name in names}
    assert grouped - {"Calls"} == set(api_page.public_names()) == set(lora_fused.__all__)
    text = (ROOT / "docs" / "api.md").read_text()
    for name in grouped:
        assert f"### `{name}`" in text
        documented = getattr(lora_fused, name, None)
        assert name == "Calls" or (documented.__doc__ or "").strip()
