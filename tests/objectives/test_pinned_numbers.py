"""The numbers of training do not change by accident."""

import pytest

from afm_pipe.params.versions import versions
from tests.objectives import pinned

REMEDY = (
    "If that is meant, raise `objective` (or `data`) in afm_pipe/params/versions.yaml, so that results are made anew, "
    "and rewrite the pins: python -m tests.objectives.pinned"
)


@pytest.fixture(scope="module")
def found() -> pinned.Pins:
    return pinned.measure()


def test_pins_belong_to_the_declared_versions() -> None:
    assert pinned.read_pins()["versions"] == versions("train"), REMEDY


@pytest.mark.parametrize("case", [*pinned.CASES, "continued", "continued_flow", "classifier"])
def test_weights_and_figures_equal_the_pinned_ones(found: pinned.Pins, case: str) -> None:
    off = dict(pinned.differences(pinned.read_pins()["cases"][case], found[case]))
    worst = sorted(off, key=off.__getitem__, reverse=True)[:3]
    listed = ", ".join(f"{name} by {off[name]:.1e}" for name in worst)
    if off:
        pytest.fail(f"Numbers changed: {len(off)} figures of {case} differ from the pinned ones ({listed}). {REMEDY}")
