"""What stands at the end: tables, the study on a line, the report."""

from collections.abc import Sequence
from pathlib import Path

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import atomic_path
from afm_pipe.runtime.progress import track


def tables(params: Params, names: Sequence[str], launch: Launch, out: Path | None = None) -> None:
    """Train and measure the missing cells of some tables, or of all, and write the tables, to `out` if it is given."""
    from afm_pipe.study.trials import Trials, write_tables

    jobs = Trials(params, names)
    if not all(job.result.is_file() for job in jobs.all):
        from afm_pipe.planning.counting import update_units
        from afm_pipe.study.runner import run_jobs

        device = launch.torch_device()
        workers = launch.num_workers(device)
        title = " ".join(["table", *names])
        track(title, run_jobs(params, jobs.all, device, workers, launch.checkpoint_seconds, update_units))
    for path in write_tables(jobs, out):
        print(path)


def toy(params: Params, launch: Launch) -> None:
    """Run the study on a line, where the best map is known: its numbers, the maps themselves, and three figures."""
    from afm_pipe.study.toy.study import run_study
    from afm_pipe.study.toy.writing import write_study

    study = track("toy", run_study(params.toy, params.seed, launch.torch_device()))
    with atomic_path(paths.TOY) as folder:
        write_study(study, params.toy, folder)


def report(params: Params) -> None:
    """Write the page, and the tables as files, from what the other stages measured."""
    from afm_pipe.reporting.page import write_report

    with atomic_path(paths.REPORT) as folder, atomic_path(paths.RENDERED) as rendered:
        write_report(params, folder, rendered)
    print(f"The report is {paths.REPORT / 'index.html'}.")
