"""README and docs: links lead somewhere, commands and params exist."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from afm_pipe import __version__
from afm_pipe.cli.app import app
from tests.conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
COMMAND = re.compile(r"^    (?:\w+=\S+ )*afm-pipe (?P<name>[a-z]+)(?P<rest>[^#>|\n]*)", re.MULTILINE)


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


def test_commands_in_the_docs_exist_with_their_flags() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = [(page.name, match) for page in PAGES for match in COMMAND.finditer(page.read_text(encoding="utf-8"))]
    assert len(found) > 20
    for name, match in found:
        command = commands.get(match["name"])
        assert command is not None, f"{name}: afm-pipe {match['name']}"
        known = {flag for param in command.params for flag in param.opts} | {"--help"}
        if match["name"] != "sbatch":  # its flags may be those of the command it wraps
            assert set(re.findall(r"--[a-z-]+", match["rest"])) <= known, f"{name}: {match.group()}"
