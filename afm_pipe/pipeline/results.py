"""Tables of the study, the 1-D toy experiment, the report."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.distributed.torchrun import run_processes
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import is_small
from afm_pipe.pipeline.current import table_step, toy_step, train_step
from afm_pipe.pipeline.notices import notice_code, notice_unused
from afm_pipe.pipeline.training import train
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import NotFiniteError, UserError
from afm_pipe.runtime.files import atomic_path, read_json, write_json
from afm_pipe.runtime.lease import HeldError, holder_of
from afm_pipe.runtime.progress import alive, track

if TYPE_CHECKING:
    from afm_pipe.study.trials import Trial


def tables(
    params: Params,
    names: Sequence[str],
    launch: Launch,
    out: Path | None = None,
    worker: bool = False,
    trial: str | None = None,
) -> None:
    """Train and measure the missing trials of some tables, by default all, and write the tables, to `out` if given.

    A `worker` writes no tables; `trial` names the one training run, by its identity, that it does.
    """
    from afm_pipe.study.trials import Trials, write_tables

    notice_unused([paths.OLD_TRIALS] if paths.OLD_TRIALS.is_dir() else [])
    collects = out is None and not (worker or trial)
    steps = [table_step(params, name) for name in names if name in params.tables] if collects else []
    current = [step.skip(launch) for step in steps]  # of each, since AFM_FORCE may name any
    if names and len(steps) == len(names) and all(current):
        return
    trials = Trials(params, names)
    chosen = [each for each in (trials.all if trial is None else trials.trained) if trial in (None, each.training)]
    if trial is not None and not chosen:
        raise UserError(
            f"Found no trial {trial!r}, expected one that `afm-pipe tables --dry-run` lists: params or data have "
            "changed; run `afm-pipe sbatch tables` again."
        )
    done = [each.result for each in chosen if each.result.is_file()]
    notice_code((f"trials of {', '.join(trials.by_table)}", read_json(result).get("code")) for result in done)
    if len(done) < len(chosen):
        from afm_pipe.planning.counting import update_units
        from afm_pipe.study.runner import run_trials

        _train_large_runs(params, chosen, launch)
        track(" ".join(["table", *names]), run_trials(params, chosen, launch, update_units))
    for path in () if worker or trial else write_tables(trials, out):
        print(path)
    for step in steps:
        step.record()


def _train_large_runs(params: Params, trials: Iterable["Trial"], launch: Launch) -> None:
    """Train the large runs of params that trials are or continue, on as many processes as launch settings say.

    A trial itself is trained by one process. Raises SystemExit with the code of processes that failed, and UserError
    where several processes, which read params.yaml, would train a run of other params.
    """
    needed = [
        each for trial in trials if not trial.result.is_file() for each in (trial, trial.base) if each is not None
    ]
    for name in dict.fromkeys(each.owner for each in needed if each.owner is not None and not is_small(each.run.size)):
        if train_step(params, name).is_current or holder_of(paths.WORK / name) is not None:
            continue  # trials wait for the process that trains it
        if launch.world_size == 1:
            with suppress(HeldError, NotFiniteError):  # a run that diverges is a result of its trial
                train(params, name, launch)
        elif params != load_params():
            raise UserError(
                f"Found the run {name} not trained, and params other than {paths.PARAMS}; expected it trained before "
                f"the trials that are or continue it: run `afm-pipe train {name}`."
            )
        elif code := run_processes(launch, ["-m", "afm_pipe", "train", name]):
            raise SystemExit(code)


def toy(params: Params, launch: Launch, strong: Path | None) -> None:
    """Run the 1-D toy experiment, where the optimal map is known: its numbers, maps and figures.

    With `strong`, run the part with ever stronger discriminators alone, and write its numbers into that file. Raises
    UserError when params do not have that part.
    """
    step = toy_step(params)
    if strong is None and step.skip(launch):
        return

    from afm_pipe.study.toy.experiment import run_experiment
    from afm_pipe.study.toy.strong import run_strong
    from afm_pipe.study.toy.writing import write_experiment

    launch.use_threads(small=True)
    device = launch.torch_device()
    if strong is not None:
        found = track("toy, strong discriminator", run_strong(params.toy, params.seed, device))
        if found is None:
            raise UserError("Found toy.strong_discriminator: null in params, expected its updates and pairs.")
        write_json(strong, found.model_dump(mode="json", exclude_none=True))
        print(strong)
        return
    experiment = track("toy", run_experiment(params.toy, params.seed, device))
    found = track("toy, strong discriminator", run_strong(params.toy, params.seed, device))
    with atomic_path(paths.TOY) as folder:
        write_experiment(experiment, found, params.toy, folder)
    step.record()


def report(params: Params) -> None:
    """Write the page, and the tables as files, from what the other stages measured."""
    from afm_pipe.reporting.page import write_report

    with alive("report"), atomic_path(paths.REPORT) as folder, atomic_path(paths.RENDERED) as rendered:
        write_report(params, folder, rendered)
    print(f"The report is {paths.REPORT / 'index.html'}.")
