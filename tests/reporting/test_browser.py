"""The page in a real Chromium: what is there, what it asks of the network (nothing), the keyboard, phones, print."""

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
from tests.reporting.report_inputs import write
from tests.reporting.test_over_seeds import with_runs_over_seeds

pytestmark = pytest.mark.browser
CONTRAST = """() => {
  const channels = color => color.match(/[0-9.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = color => {
    const [r, g, b] = channels(color).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const written = e => Array.from(e.childNodes).some(node => node.nodeType === 3 && node.data.trim());
  const elements = Array.from(document.querySelectorAll("body *"));
  return elements.filter(e => e.checkVisibility() && !e.closest("svg") && written(e)).map(e => {
    const [x, y] = [luminance(getComputedStyle(e).color), luminance(behind(e))];
    return {text: e.textContent.slice(0, 40), ratio: (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05)};
  });
}"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
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
        params = with_runs_over_seeds()
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
    titles = page.locator("h3").all_inner_texts()
    for title in (
        "Summary",
        "Runs, over three seeds",
        "Runs, one seed each",
        "Samples",
        "From seed to seed",
        "Table 4: one step",
        "Table 12: compute",
        "Cost",
    ):
        assert title in titles
    numbers = page.locator("#table-runs").get_by_text("4.00 [3.60, 4.40]")
    assert not numbers.is_visible()
    page.get_by_text("All metrics of single runs").click()
    assert numbers.is_visible()
    ours = page.locator("#table-paper_one_step tr.ours").first
    theirs = page.locator("#table-paper_one_step tr.paper").first
    colour = "e => getComputedStyle(e.children[1]).backgroundColor"
    assert ours.evaluate(colour) != theirs.evaluate(colour)
    page.locator("#table-runs").get_by_role("link", name="alpha").click()
    assert page.locator("h1").inner_text() == "alpha"


def test_columns_sort_by_value_with_the_keyboard_alone(browser: Any, report: Path) -> None:
    visit = Visit(browser, report / "index.html")
    visit.page.get_by_text("All metrics of single runs").click()
    header = visit.page.locator("#table-runs thead th").nth(2)
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
        "Array.from(document.querySelectorAll('.scroll, a[href], th button, pre, summary, .columns'))"
        ".filter(e => e.tabIndex < 0).map(e => e.outerHTML.slice(0, 80))"
    )
    assert unreached == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"


@pytest.mark.parametrize("file", ["index.html", "runs/alpha.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_screen_is_scrolled_sideways(browser: Any, report: Path, file: str, scheme: str, width: int) -> None:
    visit = Visit(browser, report / file, viewport={"width": width, "height": 844}, color_scheme=scheme)
    for folded in (True, False):
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width, f"folded: {folded}"
        visit.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


@pytest.mark.parametrize("file", ["index.html", "runs/alpha.html"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(browser: Any, report: Path, file: str, scheme: str) -> None:
    page = Visit(browser, report / file, color_scheme=scheme).page
    found = page.evaluate(CONTRAST)
    assert len(found) > 50
    assert [each for each in found if each["ratio"] < 4.5] == []


def test_headings_skip_no_level_and_regions_have_names(browser: Any, report: Path) -> None:
    page = Visit(browser, report / "index.html").page
    levels = page.evaluate("Array.from(document.querySelectorAll('h1, h2, h3, h4')).map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert page.get_by_role("navigation", name="Sections").count() == 1
    assert page.get_by_role("main").count() == 1
    regions = page.locator("[role=region]").count()
    assert page.get_by_role("region", name=re.compile(r"\w{3}"), include_hidden=True).count() == regions


def test_sections_are_a_column_on_a_screen_and_a_fold_on_a_phone(browser: Any, report: Path) -> None:
    wide = Visit(browser, report / "index.html", viewport={"width": 1280, "height": 844}).page
    link = "nav a[href='#cost']"
    assert wide.locator(link).is_visible()
    wide.mouse.wheel(0, 3000)
    wide.wait_for_function("scrollY > 2000")
    assert wide.locator("nav").bounding_box()["y"] == 0  # it stays in view
    narrow = Visit(browser, report / "index.html", viewport={"width": 390, "height": 844}).page
    assert not narrow.locator(link).is_visible()
    narrow.locator("nav summary").focus()
    narrow.keyboard.press("Enter")
    assert narrow.locator(link).is_visible()
    narrow.locator(link).click()
    narrow.wait_for_function("Math.abs(document.querySelector('#cost').getBoundingClientRect().top) < 100")


@pytest.mark.parametrize("scripts", [True, False])
def test_a_wide_table_shows_its_main_columns_and_the_rest_on_request(browser: Any, report: Path, scripts: bool) -> None:
    visit = Visit(browser, report / "index.html", java_script_enabled=scripts, viewport={"width": 1280, "height": 844})
    headers = visit.page.locator("#table-costs thead th")
    shown = [header.inner_text().strip("\xa0 ↕") for header in headers.all() if header.is_visible()]
    assert shown == ["Run", "Generator", "Images seen", "Training time", "Images/s"]
    control = visit.page.get_by_role("checkbox", name=f"Show all {headers.count()} columns").last
    control.focus()
    visit.page.keyboard.press("Space")
    assert all(header.is_visible() for header in headers.all())
    visit.page.keyboard.press("Space")
    assert not headers.last.is_visible()
    visit.page.emulate_media(media="print")
    assert all(header.is_visible() for header in headers.all())
    assert not control.is_visible()


def test_rows_are_one_line_high(browser: Any, report: Path) -> None:
    page = Visit(browser, report / "index.html", viewport={"width": 1280, "height": 844}).page
    page.get_by_text("All metrics of single runs").click()
    for table in ("table_runs", "runs", "costs", "paper_one_step"):
        rows = page.locator(f"#table-{table} tbody tr").all()
        assert len(rows) > 2
        assert max(row.bounding_box()["height"] for row in rows) < 40


def test_small_print_is_folded_and_printed_with_tables_that_fit_the_paper(browser: Any, report: Path) -> None:
    page = Visit(browser, report / "index.html", viewport={"width": 720, "height": 960}).page
    note = page.get_by_text("As a file:").first
    assert not note.is_visible()
    page.emulate_media(media="print")
    assert note.is_visible()
    assert page.locator("summary:visible").count() == 0
    tables = "Array.from(document.querySelectorAll('table'))"
    cut = f"{tables}.filter(e => e.offsetWidth > (e.closest('.wide') ? 960 : 720)).map(e => [e.id, e.offsetWidth])"
    assert page.evaluate(cut) == []  # the upright page holds 720 pixels, the one of wide tables 960


def test_without_scripts_tables_are_plain_and_whole(browser: Any, report: Path) -> None:
    visit = Visit(browser, report / "index.html", java_script_enabled=False)
    visit.page.get_by_text("All metrics of single runs").click()
    assert visit.column(1) == ["alpha", "beta", "gamma"]
    assert visit.page.locator("th button").count() == 0


def test_a_page_prints(browser: Any, report: Path, tmp_path: Path) -> None:
    Visit(browser, report / "index.html").page.pdf(path=tmp_path / "page.pdf")
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) > 1
