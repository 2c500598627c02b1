"""A run's curves as a DVCLive log while it trains, for `dvc plots`, editors and dashboards."""

from collections.abc import Generator
from pathlib import Path

from afm_pipe.runtime.progress import Progress
from afm_pipe.training.curves import Row
from afm_pipe.training.trainer import Trained, Trainer


def logged(trainer: Trainer, folder: Path) -> Generator[Progress, None, Trained]:
    """Train, logging every row of the curves to DVCLive under `folder`; the step is the update.

    The log is rewritten when a run starts, resumes or rolls back, so that it equals that of an uninterrupted run. Git,
    dvc.yaml and DVC experiments are not changed.
    """
    from dvclive import Live

    live: Live | None = None
    rows: list[Row] = []  # in the log
    training = trainer.train()
    try:
        while True:
            try:
                progress = next(training)
            except StopIteration as end:
                return end.value
            current = trainer.state.rows
            if live is None or current[: len(rows)] != rows:  # the start, or a rollback
                if live is not None:
                    live.end()
                live = Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None, monitor_system=False)
                rows = []
            for row in current[len(rows) :]:
                live.step = int(row["update"])
                for name, value in row.items():
                    if name != "update":
                        live.log_metric(name, float(value))
                live.make_summary()
                rows.append(row)
            yield progress
    finally:
        training.close()
        if live is not None:
            live.end()
