"""The curves of a run as a DVCLive log while it trains, for `dvc plots`, editors and dashboards."""

from pathlib import Path
from typing import Any

from afm_pipe.training.callback import Action, Callback, TrainerView
from afm_pipe.training.curves import Row


class LiveLog(Callback):
    """Logs every row of the curves to DVCLive under `folder`; the step is the update.

    The log is rewritten when a run starts, resumes or rolls back, so that it equals that of an uninterrupted run. Git,
    dvc.yaml and DVC experiments are not changed.
    """

    def __init__(self, trainer: TrainerView, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self._logged: list[Row] | None = None
        self._live: Any = None

    def begin(self) -> None:
        """Log the rows of earlier sessions."""
        self.after_row()

    def after_row(self) -> Action:
        """Log the new rows."""
        from dvclive import Live

        rows = self.trainer.state.rows
        if self._logged is None or rows[: len(self._logged)] != self._logged:  # the start, or a rollback
            self.end()
            self._live = Live(str(self.folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False)
            self._logged = []
        for row in rows[len(self._logged) :]:
            self._live.step = int(row["update"])
            for name, value in row.items():
                if name != "update":
                    self._live.log_metric(name, float(value))
            self._live.make_summary()
            self._logged.append(row)
        return Action.CONTINUE

    def end(self) -> None:
        """Complete the log."""
        if self._live is not None:
            self._live.end()
