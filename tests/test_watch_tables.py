"""The watch's own tables: healthy trainings, provoked failures, the automatic schedule against the one by hand."""

from pathlib import Path

from afm_pipe.params_file import load_params

ROOT = Path(__file__).parents[1]


def test_the_study_watches_ten_healthy_trainings_that_other_tables_share() -> None:
    cells = load_params(ROOT / "profiles" / "study.yaml").cells
    healthy = [cell.run for cell in cells["watch_healthy"]]
    assert len(healthy) == 10
    assert healthy[:3] == [cell.run for cell in cells["auto_schedule"] if cell.row == "by hand"]
    assert healthy[:3] == [cell.run for cell in cells["watch_provoked"] if cell.row == "healthy"]


def test_the_automatic_schedule_knows_no_epoch_but_a_bound() -> None:
    (run,) = {cell.run for cell in load_params(ROOT / "params.yaml").cells["auto_schedule"] if cell.row == "automatic"}
    assert run.schedule == "auto"
    assert [phase.until_epoch for phase in run.phases] == [16]
