"""The code a result records, and the line that is said where it differs from today's."""

import shutil
import subprocess
import sys
from pathlib import Path

from afm_pipe.params.versions import PACKAGES, PARTS, code_notice, code_record, declared
from tests.conftest import ROOT


def test_results_of_todays_code_and_of_other_versions_are_no_news() -> None:
    older = {part: f"v{version - 1} 00000000" for part, version in declared().items()}
    assert code_notice([("t4", code_record("train")), ("t4", code_record("evaluate")), ("b2", older)]) is None


def test_other_source_under_an_equal_version_is_named_in_one_line() -> None:
    changed = code_record("train") | {"objective": f"{code_record('train')['objective'].split()[0]} 00000000"}
    line = code_notice([("t4", changed), ("s4", changed), ("t4", code_record("evaluate")), ("old", None)])
    assert line is not None and "\n" not in line
    assert "version: t4, s4 (objective). If" in line
    assert line.endswith("Made by code that was not recorded: old.")


def test_results_whose_code_differs_in_the_same_parts_are_named_together() -> None:
    code = code_record("table")
    other = {part: f"{was.split()[0]} 00000000" for part, was in code.items()}
    line = code_notice([(name, other) for name in "abcdefgh"] + [("t4", code | {"objective": other["objective"]})])
    assert line is not None
    assert f"version: a, b, c, d, e and 3 more ({', '.join(sorted(code))}); t4 (objective). If" in line


def test_many_results_are_counted() -> None:
    line = code_notice([(f"r{index}", None) for index in range(30)])
    assert line == "Made by code that was not recorded: r0, r1, r2, r3, r4 and 25 more."


def test_what_is_no_record_of_code_counts_as_none() -> None:
    for nonsense in ("v1 00000000", ["x"], {"objective": 3}, {"objective": "v1 \x1b[2J"}, {}):
        assert code_notice([("t4", nonsense)]) == "Made by code that was not recorded: t4."


def test_a_comment_changes_the_digest_of_its_part_alone(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "afm_pipe", tmp_path / "afm_pipe", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "afm_pipe" / "training" / "trainer.py").open("a") as file:
        file.write("# a comment\n")
    asked = "from afm_pipe.params.versions import code_record; print(code_record('table'))"
    found = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    there, here = eval(found.stdout), code_record("table")
    assert {part for part in here if here[part] != there[part]} == {"objective"}


def test_every_part_is_declared_has_source_and_shapes_a_stage() -> None:
    assert set(declared()) == set(PACKAGES) == {part for parts in PARTS.values() for part in parts}
    assert all((ROOT / "afm_pipe" / room).is_dir() for rooms in PACKAGES.values() for room in rooms)
