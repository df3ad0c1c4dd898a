"""The documentation builds without a warning, and what it built needs nothing from elsewhere."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from doc_pages import ROOT

import hf_semckd
from hf_semckd import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("furo") is None, reason="needs the documentation tools: pip install -e '.[docs]'"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(folder / "state"), "docs"]
    done = subprocess.run([*command, str(folder / "html")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_it_builds_without_a_warning(site):
    assert (site / "index.html").is_file()


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(https?://[^\"]+)\"", page.read_text())
        assert not loaded, page.name


def test_every_public_name_is_described(site):
    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    names = {f"hf_semckd.{name}" for name in hf_semckd.__all__ if not name.startswith("_")}
    names |= {f"hf_semckd.losses.{name}" for name in losses.__all__ if name != "FEATURE_LOSSES"}
    missing = {name for name in names if f'id="{name}"' not in text}
    assert not missing
