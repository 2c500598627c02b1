"""The page in a real Chromium: what is there, what it asks of the network (nothing), sorting, the keyboard."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afm_pipe.reporting.page import write_report
from afm_pipe.runtime import paths
from tests.reporting.report_inputs import make_params, write, write_inputs

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
RUNS: dict[str, dict[str, Any]] = {"alpha": {}, "beta": {"lr": 5.0e-4}, "gamma": {"nfe": 2, "form": "residual"}}
DISTANCES = {"alpha": 30.0, "beta": 4.0, "gamma": 200.0}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"no browser: found none of {', '.join(NAMES)} on PATH; `make test-browser` installs one")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=found, args=QUIET)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before, project = Path.cwd(), tmp_path_factory.mktemp("report")
    os.chdir(project)
    try:
        params = make_params(**RUNS)
        write_inputs(params)
        for name, value in DISTANCES.items():
            stored = json.loads(paths.metrics(name).read_text())
            interval = {"fd_classifier_5k": [0.9 * value, 1.1 * value]}
            write(paths.metrics(name), stored | {"fd_classifier_5k": value, "intervals": interval})
        write_report(params, paths.REPORT, paths.RENDERED)
    finally:
        os.chdir(before)
    return project / paths.REPORT


class Visit:
    """A page opened from disk, with all it said and asked for."""

    def __init__(self, browser: Any, file: Path, **kind: Any) -> None:
        self.page = browser.new_page(**kind)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def column(self, place: int) -> list[str]:
        return self.page.locator(f"#table-runs tbody tr > *:nth-child({place})").all_inner_texts()


@pytest.mark.parametrize("file", ["index.html", "runs/alpha.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_says_nothing_and_asks_the_network_for_nothing(
    browser: Any, report: Path, file: str, scheme: str
) -> None:
    visit = Visit(browser, report / file, color_scheme=scheme)
    visit.page.wait_for_load_state("networkidle")
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith("data:")] == [(report / file).as_uri()]
    assert visit.page.evaluate("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
    assert visit.page.evaluate("document.images.length") > 2


def test_sections_and_their_numbers_are_there(browser: Any, report: Path) -> None:
    page = Visit(browser, report / "index.html").page
    titles = page.locator("h2").all_inner_texts()
    for title in ("Summary", "Runs", "Samples", "From seed to seed", "Table 4: one step", "Table 12: compute", "Cost"):
        assert title in titles
    assert page.locator("#table-runs").get_by_text("4.00 [3.60, 4.40]").is_visible()
    ours = page.locator("#table-paper_one_step tr.ours").first
    theirs = page.locator("#table-paper_one_step tr.paper").first
    colour = "e => getComputedStyle(e.children[1]).backgroundColor"
    assert ours.evaluate(colour) != theirs.evaluate(colour)
    page.locator("#table-runs").get_by_role("link", name="alpha").click()
    assert page.locator("h1").inner_text() == "alpha"


def test_columns_sort_by_value_with_the_keyboard_alone(browser: Any, report: Path) -> None:
    visit = Visit(browser, report / "index.html")
    header = visit.page.locator("#table-runs thead th").nth(1)
    assert visit.column(1) == ["alpha", "beta", "gamma"]
    for _ in range(200):
        visit.page.keyboard.press("Tab")
        if header.evaluate("e => e.contains(document.activeElement)"):
            break
    else:
        pytest.fail("the header's button is not reached by Tab")
    visit.page.keyboard.press("Enter")
    assert visit.column(1) == ["beta", "alpha", "gamma"]  # 4, 30, 200: as text 200 would come first
    assert header.get_attribute("aria-sort") == "ascending"
    visit.page.keyboard.press("Enter")
    assert visit.column(1) == ["gamma", "alpha", "beta"]
    assert header.get_attribute("aria-sort") == "descending"


def test_everything_that_scrolls_or_leads_on_is_reached_by_tab(browser: Any, report: Path) -> None:
    page = Visit(browser, report / "index.html").page
    unreached = page.evaluate(
        "Array.from(document.querySelectorAll('.scroll, a[href], th button, pre'))"
        ".filter(e => e.tabIndex < 0).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unreached == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"


@pytest.mark.parametrize("file", ["index.html", "runs/alpha.html"])
def test_a_phone_is_not_scrolled_sideways(browser: Any, report: Path, file: str) -> None:
    page = Visit(browser, report / file, viewport={"width": 390, "height": 844}).page
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_without_scripts_tables_are_plain_and_whole(browser: Any, report: Path) -> None:
    visit = Visit(browser, report / "index.html", java_script_enabled=False)
    assert visit.column(1) == ["alpha", "beta", "gamma"]
    assert visit.page.locator("th button").count() == 0


def test_a_page_prints(browser: Any, report: Path, tmp_path: Path) -> None:
    Visit(browser, report / "index.html").page.pdf(path=tmp_path / "page.pdf")
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) > 1
