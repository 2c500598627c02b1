"""The curves of a run as a DVCLive log while it trains, for `dvc plots`, editors and dashboards."""

from pathlib import Path
from typing import Any

from afm_pipe.training.callback import Action, Callback, TrainerView
from afm_pipe.training.curves import Row


class LiveLog(Callback):
    """Logs every row of the curves to DVCLive under `folder`; the step is the update.

    The log is rewritten when a run starts, resumes or rolls back, so that it equals that of an uninterrupted run. Git,
    dvc.yaml and DVC experiments are not changed. Where DVCLive cannot write, as in a git repository without a commit,
    one line says so and the run continues without this log.
    """

    def __init__(self, trainer: TrainerView, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self._logged: list[Row] | None = None
        self._live: Any = None
        self._failed = False

    def begin(self) -> None:
        """Log the rows of earlier sessions."""
        self.after_row()

    def after_row(self) -> Action:
        """Log the new rows."""
        from scmrepo.exceptions import SCMError

        if not self._failed:
            try:
                self._log(self.trainer.state.rows)
            except (OSError, SCMError) as error:
                self._failed, self._live = True, None
                print(f"Not logged with DVCLive: {error}. The run continues; its curves are written as always.")
        return Action.CONTINUE

    def _log(self, rows: list[Row]) -> None:
        from dvclive import Live

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

    def end(self) -> None:
        """Complete the log."""
        if self._live is not None:
            self._live.end()
