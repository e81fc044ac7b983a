"""report.html in a real browser: nothing fails, nothing overflows, text is readable, plots are there.

Headless Chromium, wide and narrow, light and dark. Screenshots of every view go to build/screenshots.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compiled_models import quick
from sample_reports import EVIL, full_report, histogram, hostile_report, mixed_report

from zqfp_compile import compile_model
from zqfp_compile.report.html import write_html
from zqfp_compile.report.model import Report

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')"
)

WIDTHS, SCHEMES, HEIGHT = (1280, 400), ("light", "dark"), 900
# Page -> plots that it must hold: bars of quantities, rows of cells, histograms.
PLOTS = {
    "compiled": (2, 14, 15),
    "full": (2, 14, 3),
    "mixed": (1, 21, 3),
    "hostile": (2, 4, 3),
    "bare": (0, 0, 0),
}

Browser = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium that logs what it fetches and what fails."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Root has no sandbox; a container's /dev/shm is small.
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> dict[str, Path]:
    """A page out of a compile, and made-up ones that hold what a small compile does not."""
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        "full": (full_report(), [histogram()]),
        "mixed": (mixed_report(), [histogram()]),
        "hostile": (hostile_report(), [histogram(EVIL)]),
        "bare": (Report("model.onnx", {}), []),
    }
    for name, (report, histograms) in reports.items():
        write_html(report, folder / f"{name}.html", histograms)
    compiled = compile_model(
        tiny_model("llama"), quick(target="onnxruntime"), output=folder / "compiled.zqfp"
    )
    return {
        "compiled": compiled.folder / "report.html",
        **{name: folder / f"{name}.html" for name in reports},
    }


@pytest.fixture(
    params=[(width, scheme) for width in WIDTHS for scheme in SCHEMES], ids=lambda v: f"{v[0]}-{v[1]}"
)
def view(browser: Browser, request: pytest.FixtureRequest) -> tuple[int, str]:
    """Set the browser to a width and a colour scheme."""
    width, scheme = request.param
    size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
    for log in ("browser", "performance"):
        browser.get_log(log)  # what an earlier test left
    return width, scheme


OPEN_ALL = "document.querySelectorAll('details').forEach(item => { item.open = true; })"
# The widest element is named, so that a failure says where to look.
OVERFLOW = """
if (document.scrollingElement.scrollWidth <= innerWidth) return null;
const right = item => item.getBoundingClientRect().right;
const widest = [...document.querySelectorAll('main *')].sort((a, b) => right(b) - right(a))[0];
return widest.outerHTML.slice(0, 200);
"""
# WCAG 2 contrast of every text against the colour behind it; 3 is enough for large text.
FAINT_TEXT = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = item => {
  for (; item; item = item.parentElement) {
    const found = rgb(getComputedStyle(item).backgroundColor);
    if (found.length < 4 || found[3] === 1) return found;
  }
  throw new Error('nothing is painted behind the text');
};
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const faint = [];
let count = 0;
while (texts.nextNode()) {
  const text = texts.currentNode.data.trim(), item = texts.currentNode.parentElement;
  if (!text || !item.checkVisibility() || item.closest('title, desc')) continue;
  count += 1;
  const style = getComputedStyle(item), size = parseFloat(style.fontSize);
  const svg = item.closest('svg');
  const ink = light(rgb(svg ? style.fill : style.color));
  const paper = light(behind(svg ? svg.parentElement : item));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5)) faint.push(`${text.slice(0, 60)}: ${ratio.toFixed(2)}`);
}
return [count, faint];
"""
PAPER = "return getComputedStyle(document.body).backgroundColor"
SURFACE = {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 19, 23)"}
PICTURES = """
const size = item => { const box = item.getBoundingClientRect(); return box.width * box.height; };
return [...document.querySelectorAll('svg')].map(svg => ({
  kind: svg.classList[0],
  title: svg.querySelector(':scope > title').textContent,
  empty: size(svg) === 0 || [...svg.querySelectorAll('rect')].some(item => size(item) === 0),
}));
"""


@pytest.mark.parametrize("page", PLOTS)
def test_page(
    browser: Browser, view: tuple[int, str], pages: dict[str, Path], page: str, repo_root: Path
) -> None:
    width, scheme = view
    address = pages[page].as_uri()
    browser.get(address)
    assert browser.execute_script(OVERFLOW) is None
    assert browser.execute_script(PAPER) == SURFACE[scheme]
    _check_screenshot(browser, repo_root / "build" / "screenshots" / f"{page}-{width}-{scheme}.png")

    browser.execute_script(OPEN_ALL)
    assert browser.execute_script(OVERFLOW) is None
    count, faint = browser.execute_script(FAINT_TEXT)
    assert count > 40 and faint == []

    pictures = browser.execute_script(PICTURES)
    kinds = [picture["kind"] for picture in pictures]
    assert tuple(kinds.count(kind) for kind in ("quantities", "cells", "bars")) == PLOTS[page]
    assert all(picture["title"] and not picture["empty"] for picture in pictures)

    assert browser.get_log("browser") == []
    assert _fetched(browser) == {address}


def _check_screenshot(browser: Browser, path: Path) -> None:
    """Keep a picture of the whole page; a page that shows something takes more bytes than its background."""
    shown = _screenshot(browser)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shown)
    browser.execute_script("document.querySelector('main').style.visibility = 'hidden'")
    assert len(shown) > 4 * len(_screenshot(browser))
    browser.execute_script("document.querySelector('main').style.visibility = ''")


def _screenshot(browser: Browser) -> bytes:
    width, height = browser.execute_script("return [innerWidth, document.scrollingElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return base64.b64decode(taken["data"])


def _fetched(browser: Browser) -> set[str]:
    """The addresses that the browser asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    assert not [item for item in messages if item["method"] == "Network.loadingFailed"]
    return {
        item["params"]["request"]["url"] for item in messages if item["method"] == "Network.requestWillBeSent"
    }


def test_nothing_from_a_hostile_model_becomes_an_element(browser: Browser, pages: dict[str, Path]) -> None:
    browser.get(pages["hostile"].as_uri())
    foreign = "return document.querySelectorAll('script, img, iframe, object, embed, link, a').length"
    assert browser.execute_script(foreign) == 0
    assert browser.execute_script("return document.querySelector('h1').textContent") == EVIL


def test_a_foreign_address_is_refused_and_seen(browser: Browser, pages: dict[str, Path]) -> None:
    page = pages["bare"].with_name("foreign.html")
    picture = '<img src="http://127.0.0.1:9/x.png"><h1>'
    page.write_text(pages["bare"].read_text(encoding="utf-8").replace("<h1>", picture), encoding="utf-8")
    browser.get_log("performance")
    browser.get(page.as_uri())
    (entry,) = browser.get_log("browser")
    assert "Content Security Policy" in entry["message"]


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("document.querySelector('.note').style.color = '#999'", FAINT_TEXT),
        ("document.querySelector('h1').style.width = '2000px'", OVERFLOW),
    ],
)
def test_the_checks_can_fail(browser: Browser, pages: dict[str, Path], broken: str, found: str) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get(pages["full"].as_uri())
    browser.execute_script(broken)
    result = browser.execute_script(found)
    assert (result if isinstance(result, str) else result[1]) not in (None, [])
