"""README.md and docs are short where that was promised, up to date, and have links that lead somewhere."""

import ast
import importlib
import re
import sys

import pytest
from doc_pages import PAGES, ROOT, name

from hf_semckd.cli.distill import defaults
from hf_semckd.losses import FEATURE_LOSSES
from hf_semckd.losses.semckd.defaults import IMAGE_DEFAULTS, MAP_DEFAULTS, SEQUENCE_DEFAULTS

README = ROOT / "README.md"
LINK = re.compile(r"\]\((?P<path>[^)#\s]*)(?:#(?P<anchor>[\w-]+))?\)")
REGION = re.compile(r"<!-- ([\w-]+)(?: [\w.+-]+)* -->.*?<!-- /\1 -->", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]+`|\$[^$]+\$", re.DOTALL)


def texts_of(path):
    """Return the strings in a file of Python, with a mark for what is filled in."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    filled = [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return filled + [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("pages")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def anchors(text):
    """Return the anchors of a page: its headings as GitHub and MyST make them, and explicit targets."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.finditer(page.read_text()):
        if "://" in link["path"]:
            continue
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        assert target.exists(), link[0]
        if link["anchor"]:
            assert link["anchor"] in anchors(target.read_text()), link[0]


def test_every_region_is_up_to_date(generator):
    found = generator.regions()
    stale = [name(page) for page in generator.pages() if generator.fill(page.read_text(), found) != page.read_text()]
    assert not stale, "run: python scripts/pages.py"


def test_the_pages_have_the_regions_that_they_are_for(generator):
    regions = {found[1] for page in generator.pages() for found in REGION.finditer(page.read_text())}
    assert regions == set(generator.regions())
    assert {"headline", "summary"} <= {found[1] for found in REGION.finditer(README.read_text())}


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs" / "results").glob("*.md"))], ids=name)
def test_no_measured_number_is_typed_by_hand(page):
    """Outside regions and code, nothing looks like a result: points, percent, times or a decimal."""
    text = CODE.sub("", REGION.sub("", page.read_text()))
    suspicious = re.findall(r"\d+\.\d+|\d+(?:\.\d+)? (?:%|points|times|ms|GB)", text)
    assert set(suspicious) <= {"3.10", "2.0", "5 %", "95 %", "40 %"}, suspicious


def test_inline_regions_do_not_begin_a_line():
    """Markdown takes a comment at the beginning of a line for a block, and ends the paragraph."""
    for page in PAGES:
        inline = re.findall(r"^ *<!-- [\w-]+(?: \S+)* -->[^\n].*$", page.read_text(), re.M)
        assert not inline, name(page)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "methods.md"], ids=name)
def test_every_method_has_a_line(page):
    lines = dict(re.findall(r"^\| `\"([a-z_0-9]+)\"` (\|.+)$", page.read_text(), re.M))
    assert set(lines) | {"semckd"} == set(FEATURE_LOSSES)
    for method, cells in lines.items():
        found = re.match(r"\| `(\w+)` \| ([\d.]+) \|", cells)
        if found:
            loss = FEATURE_LOSSES[method]
            assert (loss.__name__, loss.default_weight) == (found[1], float(found[2]))


def test_the_defaults_are_those_of_the_code():
    table = (ROOT / "docs" / "methods.md").read_text().split("| option |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.M)
    assert len(rows) == 7
    for option, cells in rows:
        field = {"association_temperature": "similarity_temperature"}.get(option, option)
        values = [getattr(defaults, field) for defaults in (MAP_DEFAULTS, IMAGE_DEFAULTS, SEQUENCE_DEFAULTS)]
        assert cells == " | ".join(f'`"{value}"`' if isinstance(value, str) else f"{value:g}" for value in values)


def test_the_messages_that_are_quoted_are_those_of_the_code():
    said = [text for path in (ROOT / "hf_semckd").rglob("*.py") for text in texts_of(path)]
    quoted = re.findall(r"^> (.+)$", (ROOT / "docs" / "guides" / "troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 15
    for quote in quoted:
        wanted = re.compile(".*".join(map(re.escape, quote.split("..."))), re.DOTALL)
        assert any(map(wanted.search, said)), quote


def test_the_defaults_of_recipes_are_those_of_the_code():
    table = (ROOT / "docs" / "reference" / "recipe.md").read_text().split("## Other defaults than Trainer's")[1]
    told = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.M))
    found = defaults("NAME.yaml")
    assert list(told) == list(found)
    fixed = {name: value.strip("`") for name, value in told.items() if value.startswith("`")}
    assert len(fixed) == 8
    assert fixed == {name: str(found[name]) for name in fixed}


PICTURES = sorted((ROOT / "docs" / "_static" / "pictures").glob("*"))


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_shown(picture):
    assert picture.stat().st_size <= 200_000
    assert any(f"pictures/{picture.name})" in page.read_text() for page in PAGES)
