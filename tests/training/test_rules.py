"""The monitor's rules on synthetic traces: each fires on its failure, and not beside it."""

from typing import Any

import pytest

from afm_pipe.objectives.adversarial_flow.objective import AdversarialFlow
from afm_pipe.params import Run, deep_merge
from afm_pipe.training.curves import Row
from afm_pipe.training.rules import (
    MonitoredColumns,
    ProbeResult,
    alarms_of_probes,
    alarms_of_rows,
    collapse,
    divergence,
    identity,
    spread_lost,
    stagnation,
    stopped_improving,
    trend,
)

WATCHED = MonitoredColumns.of(AdversarialFlow)
HEALTHY = {"d_adversarial": 0.5, "g_adversarial": 1.2, "d_accuracy": 0.75, "transport_rms": 1.2, "output_scale": 1.0}


@pytest.fixture
def run(smoke_run: Run) -> Run:
    raw = smoke_run.model_dump(mode="json")
    return Run.model_validate(deep_merge(raw, {"monitor": {"settle_epochs": 1.0}}))


def trace(count: int = 40, **columns: Any) -> list[Row]:
    """Rows of four epochs at the most, of a healthy run but for some columns: numbers, or lists of them."""
    rows = []
    for index in range(count):
        row = dict.fromkeys(AdversarialFlow.columns(), 0.1) | HEALTHY
        row |= {"update": 10 * (index + 1), "images": 80 * (index + 1), "epoch": (index + 1) / 10}
        row |= {name: value[index] if isinstance(value, list) else value for name, value in columns.items()}
        rows.append(row)
    return rows


def probes(*kids: float, error: float = 0.02, **figures: float) -> list[ProbeResult]:
    """A probe an epoch, of a healthy run but for some figures."""
    healthy = {"class_accuracy": 0.9, "variance": 0.6, "spread": 0.9} | figures
    healthy = {f"{name}_error": 0.01 for name in healthy} | healthy
    clocks = [{"update": 100 * n, "epoch": float(n), "kid": kid, "kid_error": error} for n, kid in enumerate(kids, 1)]
    return [clock | healthy for clock in clocks]


def test_nothing_fires_on_a_healthy_trace(run: Run) -> None:
    rows, found = trace(), probes(9.0, 5.0, 3.0, 2.0)
    assert alarms_of_rows(run, WATCHED, rows) == []
    assert alarms_of_probes(run, WATCHED, rows, found) == []


@pytest.mark.parametrize(
    ("column", "value"),
    [("d_adversarial", 9.0), ("g_adversarial", 9.0), ("output_scale", 3.0), ("g_adversarial", float("nan"))],
)
def test_divergence_is_an_exploding_loss_or_output(run: Run, column: str, value: float) -> None:
    alarm = divergence(run, WATCHED, trace(**{column: value}))
    assert alarm is not None
    early = divergence(run, WATCHED, trace(5, **{column: value}))
    assert (early is not None) == (value != value), "before it has settled only a non-finite loss is an alarm"
    assert alarm.kind == "divergence"
    assert column in alarm.evidence
    one_row = [HEALTHY[column]] * 39 + [1.5 * value if value < 5 else 15.0]
    assert value != value or divergence(run, WATCHED, trace(**{column: one_row})) is None, "one row is no divergence"


def test_samples_that_vary_hardly_at_all_are_a_divergence(run: Run) -> None:
    alarm = spread_lost(run, probes(5.0, spread=0.02))
    assert alarm is not None
    assert alarm.kind == "divergence"
    assert spread_lost(run, probes(5.0, spread=0.5)) is None


def test_identity_is_a_generator_that_does_not_move(run: Run) -> None:
    assert identity(run, WATCHED, trace(transport_rms=0.1)) is not None
    assert identity(run, WATCHED, trace(8, transport_rms=0.1)) is None, "every run starts so"
    assert identity(run, WATCHED, trace(transport_rms=0.5)) is None
    steps = run.model_copy(update={"nfe": 4})
    assert identity(steps, WATCHED, trace(transport_rms=0.2)) is None, "one of four steps goes a quarter of the way"
    assert identity(steps, WATCHED, trace(transport_rms=0.04)) is not None


def test_stagnation_needs_both_no_progress_and_a_winning_discriminator(run: Run) -> None:
    stuck = probes(9.0, 5.0, 5.1, 4.9, 5.0, 5.0)
    won, even = trace(60, d_accuracy=0.99), trace(60)
    alarm = stagnation(run, WATCHED, won, stuck)
    assert alarm is not None
    assert alarm.evidence["kid"] == 5.0
    assert alarm.evidence["kid_error"] == 0.02
    assert alarm.evidence["d_accuracy"] == pytest.approx(0.99)
    assert stagnation(run, WATCHED, even, stuck) is None
    late = [0.5] * 20 + [0.99] * 40
    assert stagnation(run, WATCHED, trace(60, d_accuracy=late), stuck) is not None, (
        "rows before the window do not count"
    )


def test_a_plateau_is_a_trend_significantly_worse_than_progress(run: Run) -> None:
    progress = [5.0 * 0.9**n for n in range(5)]
    assert not stopped_improving(run, probes(*progress))
    assert stopped_improving(run, probes(5.0, 5.02, 4.98, 5.0, 5.01))
    assert not stopped_improving(run, probes(5.0, 5.02, 4.98, 5.0, 5.01, error=1.0)), "that may be noise"
    assert not stopped_improving(run, probes(5.0, 3.0, 7.0, 4.0, 6.0)), "so may a run whose path scatters"


def test_the_trend_is_the_least_squares_line_and_its_error(run: Run) -> None:
    found = trend(run, probes(5.0, 4.0, 3.0, 2.0, 1.0, error=0.3))
    assert found.slope == pytest.approx(-1 / 3)
    assert found.slope_error == pytest.approx(0.3 / 10**0.5 / 3)


@pytest.mark.parametrize(("figure", "low", "enough"), [("variance", 0.1, 0.35), ("class_accuracy", 0.2, 0.5)])
def test_collapse_is_a_loss_of_variance_within_classes_or_of_classes(
    run: Run, figure: str, low: float, enough: float
) -> None:
    alarm = collapse(run, probes(5.0, 5.0, **{figure: low}))
    assert alarm is not None
    assert (alarm.kind, alarm.evidence[figure]) == ("collapse", low)
    assert collapse(run, probes(5.0, 5.0, **{figure: enough})) is None
    assert alarm.evidence[f"{figure}_error"] == 0.01
    assert collapse(run, probes(5.0, 5.0, **{figure: low, f"{figure}_error": 1.0})) is None, "that may be noise"


@pytest.mark.parametrize("figure", ["variance", "class_accuracy"])
def test_a_collapse_of_some_classes_is_a_significant_drop(run: Run, figure: str) -> None:
    before, after = probes(*[5.0] * 5, **{figure: 0.9}), probes(*[5.0] * 7, **{figure: 0.55})[5:]
    alarm = collapse(run, before + after)
    assert alarm is not None
    assert alarm.evidence[f"{figure}_before"] == pytest.approx(0.9)
    assert collapse(run, before + after[:1]) is None, "one probe is none"
    assert collapse(run, before + probes(*[5.0] * 7, **{figure: 0.7})[5:]) is None, "a small drop is none"
    noisy = probes(*[5.0] * 7, **{figure: 0.55, f"{figure}_error": 0.2})[5:]
    assert collapse(run, before + noisy) is None, "that may be noise"


def test_a_collapse_that_passes_or_comes_while_all_begins_is_none(run: Run) -> None:
    first, second = probes(5.0, 5.0, variance=0.1)
    assert collapse(run, [first]) is None
    assert collapse(run, [first, second | {"variance": 0.5}]) is None
    assert collapse(run, [first | {"variance": 0.5}, second]) is None
    assert collapse(run, [first | {"epoch": 0.5}, second]) is None


def test_a_plateau_is_judged_from_the_probes_of_its_phase(run: Run) -> None:
    assert not stopped_improving(run, probes(5.0, 5.0, 5.0, 5.0))
    flat = probes(9.0, 5.0, 5.0, 5.0, 5.0, 5.0)
    assert stopped_improving(run, flat)
    assert stopped_improving(run, flat, since=100)
    assert not stopped_improving(run, flat, since=200)


def test_thresholds_are_params(run: Run) -> None:
    raw = run.model_dump(mode="json")
    strict = Run.model_validate(deep_merge(raw, {"monitor": {"identity": {"transport_rms": 1.3}}}))
    assert identity(strict, WATCHED, trace()) is not None
    assert identity(run, WATCHED, trace()) is None
