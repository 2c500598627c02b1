"""The curves of a run in other tools while it trains: DVCLive always, TensorBoard and Weights & Biases on request."""

import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from afm_pipe.distributed.launch import Launch
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import json_value, write_json
from afm_pipe.training.callback import Action, Callback, TrainerView
from afm_pipe.training.curves import Row

FINISH_SECONDS = 60.0  # for the last uploads to Weights & Biases; then the run goes on


class RowLog(Callback):
    """Writes every row of the curves to another tool; the step is the update.

    The log is begun anew when a run starts, resumes or rolls back, so that it equals that of an uninterrupted run.
    Where the tool cannot write, one line says so and the run continues without this log.
    """

    tool: str

    def __init__(self, trainer: TrainerView) -> None:
        self.trainer = trainer
        self._logged: list[Row] | None = None
        self._failed = False

    @abstractmethod
    def failures(self) -> tuple[type[Exception], ...]:
        """Return the errors of the tool that stop the log and not the run."""

    @abstractmethod
    def restart(self, rolled_back: bool) -> None:
        """Begin an empty log: at the start of a session, or after a rollback."""

    @abstractmethod
    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Write one row."""

    def flush(self) -> None:
        """Make the rows written so far readable."""

    def close(self) -> None:
        """Complete the log."""

    def begin(self) -> None:
        """Log the rows of earlier sessions."""
        self.after_row()

    def after_row(self) -> Action:
        """Log the new rows."""
        self._attempt(self._log)
        return Action.CONTINUE

    def end(self) -> None:
        """Complete the log."""
        self._attempt(self.close)

    def _log(self) -> None:
        rows = self.trainer.state.rows
        if self._logged is None or rows[: len(self._logged)] != self._logged:
            self.close()
            self.restart(rolled_back=self._logged is not None)
            self._logged = []
        for row in rows[len(self._logged) :]:
            self.write(int(row["update"]), {name: float(value) for name, value in row.items() if name != "update"})
            self._logged.append(row)
        self.flush()

    def _attempt(self, work: Any) -> None:
        if self._failed:
            return
        try:
            work()
        except self.failures() as error:
            self._failed = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = reason.rstrip(".")
            print(f"Not logged with {self.tool}: {reason}. The run continues; its curves are written as always.")


class LiveLog(RowLog):
    """Logs to DVCLive under `folder`. Git, dvc.yaml and DVC experiments are not changed."""

    tool = "DVCLive"

    def __init__(self, trainer: TrainerView, folder: Path) -> None:
        super().__init__(trainer)
        self.folder = folder
        self._live: Any = None

    def failures(self) -> tuple[type[Exception], ...]:
        """Return DVCLive's: in a git repository without a commit it cannot write."""
        from scmrepo.exceptions import SCMError

        return OSError, SCMError

    def restart(self, rolled_back: bool) -> None:
        """Begin an empty log."""
        from dvclive import Live

        self._live = Live(str(self.folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False)

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        self._live.step = update
        for name, value in values.items():
            self._live.log_metric(name, value)
        self._live.make_summary()

    def close(self) -> None:
        """Complete the log."""
        if self._live is not None:
            self._live.end()


class TensorBoardLog(RowLog):
    """Logs to TensorBoard's event files in `folder`, which holds nothing else."""

    tool = "TensorBoard"

    def __init__(self, trainer: TrainerView, folder: Path) -> None:
        super().__init__(trainer)
        self.folder = folder
        self._writer: Any = None

    def failures(self) -> tuple[type[Exception], ...]:
        """Return errors of the disk."""
        return (OSError,)

    def restart(self, rolled_back: bool) -> None:
        """Begin an empty log; a TensorBoard that shows the old one drops its points (purge_step)."""
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self.folder, ignore_errors=True)
        self._writer = SummaryWriter(str(self.folder), purge_step=0)

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Write one row."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, update)

    def flush(self) -> None:
        """Write to the disk, so that a kill loses no row."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WandbLog(RowLog):
    """Logs to Weights & Biases, whose own variables (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY) say where.

    Steps that the server has cannot be taken back: a session continues the run of the same id after the last of them,
    and a rollback begins another run in the same group. Offline, each session writes all rows, and removes what earlier
    ones wrote and nobody has uploaded, which lacks the last seconds before a kill.
    """

    tool = "Weights & Biases"

    def __init__(self, trainer: TrainerView, name: str, identity: str, settings: dict[str, Any]) -> None:
        super().__init__(trainer)
        self.name, self.identity, self.settings = name, identity, settings
        self.folder = paths.WORK / "wandb"  # where W&B puts its files for dir=work
        self._run: Any = None

    def failures(self) -> tuple[type[Exception], ...]:
        """Return W&B's: no login, no network within its time limit."""
        from wandb.errors import Error

        return OSError, Error

    def restart(self, rolled_back: bool) -> None:
        """Continue the run that an earlier session began, or begin one."""
        import wandb

        record = self.folder / f"{self.name}.json"
        known = json_value(record, self.identity)
        number = (known if type(known) is int else 1) + rolled_back
        write_json(record, {self.identity: number})  # and W&B needs the folder to exist
        run_id = f"{self.name}-{self.identity}-{number}"
        earlier = sorted(self.folder.glob(f"offline-run-*-{run_id}*"))
        self._run = wandb.init(
            id=run_id,
            name=self.name if number == 1 else f"{self.name} ({number})",
            group=self.name,
            project=None if "WANDB_PROJECT" in os.environ else "afm-pipe",
            dir=str(paths.WORK.absolute()),
            config=self.settings,
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS),
        )
        for folder in earlier if self._run.offline else ():
            if not list(folder.glob("*.synced")):
                shutil.rmtree(folder)

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Send one row, unless the server has it from an earlier session."""
        if update >= self._run.step:  # the first step that the server lacks
            self._run.log(dict(values), step=update)

    def close(self) -> None:
        """Finish the run; what cannot be uploaded in time stays for `wandb sync`."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def require_loggers(launch: Launch) -> None:
    """Raise UserError, before anything is trained, if a requested tool is not installed."""
    for setting in ("tensorboard", "wandb"):
        if not getattr(launch, setting):
            continue
        try:
            distribution(setting)
        except PackageNotFoundError:
            raise UserError(
                f"Found launch setting {setting} = true, and no package {setting}: pip install {setting}, or unset "
                f"AFM_{setting.upper()}."
            ) from None


def row_logs(trainer: TrainerView, name: str, identity: str, launch: Launch, settings: dict[str, Any]) -> list[RowLog]:
    """Return the logs of a run: DVCLive, and what the launch settings request. `settings` describe the run."""
    logs: list[RowLog] = [LiveLog(trainer, paths.WORK / "dvclive" / name)]
    if launch.tensorboard:
        logs.append(TensorBoardLog(trainer, paths.WORK / "tensorboard" / name))
    if launch.wandb:
        logs.append(WandbLog(trainer, name, identity, settings))
    return logs
