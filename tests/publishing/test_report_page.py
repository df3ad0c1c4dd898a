"""The page of a report in a browser: it is drawn, quiet, as wide as the screen, in light and in dark."""

import pytest
from browser import browser, installed
from reports import HOSTILE, whole

pytestmark = pytest.mark.skipif(not installed(), reason="needs chromium and chromedriver")
PHONE, DESK = 360, 1100
WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"
COLORS = "[document.body, document.querySelector('section')].map(part => getComputedStyle(part).backgroundColor)"
INK = "getComputedStyle(document.body).color"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module", params=["plain", HOSTILE], ids=["plain", "hostile"])
def page(request, tmp_path_factory):
    return whole(request.param).save(tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_is_as_wide_as_the_screen_and_the_console_is_quiet(chromium, page, width):
    chromium.show(page, width)
    assert chromium.ask(WIDTHS) == [width, width]
    assert chromium.errors == []


def test_everything_is_drawn(chromium, page):
    chromium.show(page, DESK)
    assert chromium.ask("document.querySelectorAll('section').length") == 7
    assert chromium.ask("document.querySelectorAll('script').length") == 0
    boxes = "[...document.querySelectorAll('svg, .heat td, .examples img')].map(part => part.getBoundingClientRect())"
    assert chromium.ask(f"{boxes}.length") == 4 + 4 * 24 + 3
    assert chromium.ask(f"{boxes}.every(box => box.width > 5 && box.height > 5)")
    assert chromium.ask("[...document.images].every(image => image.naturalWidth > 0)")


def test_dark_and_light_are_both_readable(chromium, page):
    seen = {}
    for dark in (False, True):
        chromium.show(page, DESK, dark=dark)
        channels = [[int(n) for n in color[4:-1].split(",")] for color in (*chromium.ask(COLORS), chromium.ask(INK))]
        seen[dark] = [sum(color) / 3 for color in channels]
    assert min(seen[False][:2]) > 230 and seen[False][2] < 60
    assert max(seen[True][:2]) < 40 and seen[True][2] > 200
