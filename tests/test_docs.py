"""README and docs: links lead somewhere, versions agree, and the site builds without a warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from afm_pipe import __version__
from afm_pipe.reporting.study import spread_text
from afm_pipe.reporting.titles import base_key
from afm_pipe.runtime.files import read_model
from afm_pipe.study.results import TableResults
from afm_pipe.study.statistics import spread
from tests.conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")


def test_readme_is_at_most_10_kb() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_version_changelog_and_citation_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest, date = re.findall(r"^## \[(\d.*?)\](?: - (.*))?$", changes, re.MULTILINE)[0]
    assert newest == citation["version"] == __version__
    assert date == str(citation["date-released"])
    assert citation["license"] == "MIT" and citation["authors"] and citation["references"][0]["authors"]


def test_each_entry_of_the_changelog_is_one_line_under_a_known_heading() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text().partition("## [Unreleased]")[2]
    lines = [line for line in changes.splitlines() if line]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {line.removeprefix("### ") for line in lines if line.startswith("### ")} <= kinds
    entries = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"- .{10,118}\.", line) for line in entries), [x for x in entries if len(x) > 120]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, heading in LINK.findall(prose):
        path = page.parent / target if target else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{target}{heading}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r": ([a-z-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(listed)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert pages >= {path.stem for path in (ROOT / "docs").glob("*.md")} | {"changelog", "commands", "params-reference"}
    text = (tmp_path / "site" / "method" / "index.html").read_text()
    assert text.count("<math") > 5 and "$$" not in text and "def</span>" in text
    fields = (tmp_path / "site" / "params-reference" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in fields for name in ("logit_centering", "batch_fraction", "until_epoch"))


def test_the_readmes_results_are_the_committed_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("<!-- results begin -->")[2].partition("<!-- results end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines()[3:]]
    path = ROOT / "results" / "tables" / "runs.json"
    results = read_model(TableResults, path, "run `dvc repro table@runs`")
    keys = (results.distance_key, f"ratio_{base_key(results.distance_key)}_500", "class_accuracy")
    expected = [
        [f"`{results.table.runs[label]}`", label, *(spread_text(spread(results.at(label, ""), key)) for key in keys)]
        for label in results.table.rows.settings
    ]
    assert sorted(rows) == sorted(expected)
