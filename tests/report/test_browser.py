"""The page in a real headless Chromium: drawn, alone, no wider than a phone, readable; and printed."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from headgate.experiments.report import write_report

from .conftest import make_comparison

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 380, "height": 800}

CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = c => { const [r, g, b] = parse(c).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor, p = parse(c);
                        if (p.length < 4 || p[3] > 0) return c; } return 'rgb(255, 255, 255)'; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node; (node = walker.nextNode());) {
    if (!node.textContent.trim()) continue;
    const e = node.parentElement, style = getComputedStyle(e), drawn = e.closest('svg');
    const [a, b] = [light(drawn ? style.fill : style.color), light(ground(e))].sort((x, y) => y - x);
    const cell = drawn && ['rgb(0, 0, 0)', 'rgb(255, 255, 255)'].includes(style.fill);
    if (!cell) found.push([node.textContent.trim().slice(0, 40), (a + .05) / (b + .05)]);
  }
  return found; }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get("HEADGATE_BROWSER") == "required":
            pytest.fail(
                f"none of {', '.join(NAMES)} is installed, and HEADGATE_BROWSER=required asks for one"
            )
        pytest.skip("no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["five arms", "long names, one seed"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "five arms":
        written = request.getfixturevalue("written")
    else:
        arms = {"lora": {}, "an_arm_with_quite_a_long_name_" * 3: {"lora": {"r": 4}}}
        written = write_report(make_comparison(tmp_path_factory.mktemp("page"), [1], arms=arms))
    return str(written.page.resolve().as_uri())


def opened(browser: Any, address: str, viewport: dict[str, int], **options: Any) -> tuple[Any, list[str]]:
    page = browser.new_page(viewport=viewport, **options)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    return page, [url for url in asked if not url.startswith("data:")]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_drawn_alone_and_never_scrolls_sideways(
    browser: Any, address: str, viewport: dict[str, int]
) -> None:
    page, asked = opened(browser, address, viewport, java_script_enabled=False)
    assert asked == [address], "the page asked for something else than itself"
    pixels = imread(io.BytesIO(page.screenshot()))
    assert np.ptp(pixels[..., :3]) > 0.5 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
    page.close()
    page, _ = opened(browser, address, viewport)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    heights = page.evaluate(
        "[...document.querySelectorAll('.panel svg')].map(e => e.getBoundingClientRect().height)"
    )
    assert heights and min(heights) > 40, "a drawing has no height"
    page.close()


def test_text_stands_out_from_its_ground(browser: Any, address: str) -> None:
    """WCAG AA, 4.5:1, for every text of the page and its drawings; cells of heat maps have a test of their own."""
    page, _ = opened(browser, address, DESKTOP)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = page.evaluate(CONTRAST)
    faint = [(text, round(ratio, 2)) for text, ratio in found if ratio < 4.5]
    assert len(found) > 100 and not faint, faint
    page.close()


def test_structure_for_readers_who_do_not_see_it(browser: Any, address: str) -> None:
    page, _ = opened(browser, address, DESKTOP)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), levels
    assert page.title() and page.evaluate("document.documentElement.lang") == "en"
    unnamed = page.evaluate("[...document.querySelectorAll('[role=img]')].filter(e => !e.ariaLabel).length")
    assert unnamed == 0
    bare = page.evaluate(
        "[...document.querySelectorAll('table')].filter(t => !t.caption || !t.querySelector('thead th[scope=col]')"
        " || [...t.querySelectorAll('tbody tr')].some(r => !r.querySelector('th[scope=row]'))).length"
    )
    assert bare == 0, "a table without caption or headers"
    page.close()


@pytest.mark.parametrize("width", [718, 640])
def test_it_prints_with_nothing_cut_off(browser: Any, address: str, width: int) -> None:
    """On A4, with a margin of 1 or 2 cm: no table runs over its box or falls apart into cards, and the folds are open."""
    page, _ = opened(browser, address, {"width": width, "height": 1000})
    page.emulate_media(media="print")
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert cut == 0
    assert page.evaluate("getComputedStyle(document.querySelector('.cards td')).display") == "table-cell"
    heights = (
        "(selector) => [...document.querySelectorAll(selector)].map(e => e.getBoundingClientRect().height)"
    )
    assert all(page.evaluate(heights, "details:not(.verbatim) pre"))
    recipes = page.evaluate(heights, "details.verbatim")
    assert recipes and not any(recipes), "pages of YAML are for the screen"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
