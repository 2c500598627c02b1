"""The table of the checks, printed at the end and written with the card's name to benchmarks/gpu/NAME.md."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic matrix products

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu.inputs import CARD, card_name, write_page

Check = Callable[[str, str, bool], None]
ROWS: list[tuple[str, str, str, str]] = []


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Check:
    """Return a function that records what was found, the rule and whether it passed, and fails if it did not."""

    def record(found: str, rule: str, passed: bool) -> None:
        ROWS.append((request.node.name, found, rule, "yes" if passed else "NO"))
        assert passed, f"found {found}, expected {rule}"

    return record


@pytest.fixture(autouse=True)
def clean_card() -> Any:
    """Leave no memory of one check to the next."""
    yield
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        ROWS.append((report.location[2], "skipped", reason.removeprefix("Skipped: "), ""))
    elif report.failed and not any(row[0] == report.location[2] for row in ROWS):
        ROWS.append((report.location[2], "error", str(report.longrepr).splitlines()[-1], "NO"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section(f"checks on {card_name()}")
    for row in ROWS:
        terminalreporter.write_line("  ".join((row[0].ljust(52), row[3].ljust(3), row[1], "|", row[2])))
    if CARD.type == "cuda":
        terminalreporter.write_line(f"written to {write_page('Checks', ('check', 'found', 'rule', 'pass'), ROWS)}")
