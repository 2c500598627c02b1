"""The watch's own tables: healthy trainings, provoked failures, the automatic schedule against the one by hand."""

from pathlib import Path

from afm_pipe.params.file import load_params

ROOT = Path(__file__).parents[2]


def test_the_study_watches_ten_healthy_trainings_and_provokes_failures_on_three_seeds() -> None:
    cells = load_params(ROOT / "profiles" / "study.yaml").cells
    assert len({cell.seed for cell in cells["monitor_healthy"]}) == 10
    by_hand = [cell.run for cell in cells["auto_schedule"] if cell.row == "by hand"]
    assert by_hand == [cell.run for cell in cells["monitor_provoked"] if cell.row == "healthy"]


def test_the_automatic_schedule_knows_no_epoch_but_a_bound() -> None:
    (run,) = {cell.run for cell in load_params(ROOT / "params.yaml").cells["auto_schedule"] if cell.row == "automatic"}
    assert run.schedule == "auto"
    assert [phase.until_epoch for phase in run.phases] == [16]
