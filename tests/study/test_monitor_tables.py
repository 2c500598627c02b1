"""The tables that test the monitor: healthy runs, provoked failures, the automatic schedule against a manual one."""

from afm_pipe.params.file import load_params
from tests.conftest import ROOT


def test_study_covers_ten_healthy_runs_and_failures_on_three_seeds() -> None:
    trials = load_params(ROOT / "profiles" / "study.yaml").trials
    assert len({trial.place.seed for trial in trials["monitor_healthy"]}) == 10
    assert len({trial.place.seed for trial in trials["monitor_provoked"]}) == 3
    by_hand = [trial.run for trial in trials["auto_schedule"] if trial.place.row == "manual"]
    assert by_hand == [trial.run for trial in trials["monitor_provoked"] if trial.place.row == "healthy"]


def test_automatic_schedule_is_given_a_bound_and_no_other_epoch() -> None:
    trials = load_params(ROOT / "profiles" / "study.yaml").trials["auto_schedule"]
    runs = [trial.run for trial in trials if trial.place.row == "automatic"]
    assert runs and all(run.schedule == "auto" for run in runs)
    assert all([phase.until_epoch for phase in run.phases] == [60] for run in runs)
