"""The pool: train, sample and measure everything that params name, several jobs at a time, each on one thread.

DVC runs one stage after the other, which leaves all cores but one idle where networks are small. The pool runs before
those stages, does their work on all cores through the same functions, and they then find their outs current.
"""

from typing import Any, NamedTuple

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params, Toy
from afm_pipe.params.sizes import is_small
from afm_pipe.pipeline.current import (
    Step,
    evaluate_step,
    sample_step,
    table_step,
    toy_step,
    train_step,
)
from afm_pipe.pipeline.results import toy
from afm_pipe.pipeline.runs import evaluate, sample
from afm_pipe.pipeline.training import train
from afm_pipe.runtime import paths
from afm_pipe.runtime.environment import env_world_size
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path
from afm_pipe.runtime.lease import HeldError, holder_of
from afm_pipe.runtime.progress import track
from afm_pipe.study.trials import Trials, run_weight

TOY_WORK = 7.0  # of a pair of updates of the toy experiment, in the unit of `run_weight`


class RunJob(NamedTuple):
    """Train, sample and measure a run or guided run."""

    params: Params
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def weight(self) -> float:
        """Estimated work."""
        return run_weight(self.params.model(self.name), self.name in self.params.guided)

    @property
    def steps(self) -> list[Step]:
        """Its stages."""
        return [step(self.params, self.name) for step in (train_step, sample_step, evaluate_step)]

    @property
    def is_done(self) -> bool:
        """Whether all its stages are current."""
        return all(step.is_current for step in self.steps)

    @property
    def is_ready(self) -> bool:
        """Whether the run that it continues is trained, and no other process seems to train it."""
        guided = self.params.guided.get(self.name)
        return self.holder is None and (guided is None or train_step(self.params, guided.base).is_current)

    @property
    def holder(self) -> str | None:
        """The other process that seems to train it, if any."""
        return holder_of(paths.WORK / self.name)

    def run(self, context: Any) -> bool:
        """Train, sample and measure."""
        try:
            for stage in (train, sample, evaluate):
                stage(self.params, self.name, context.launch)
        except HeldError:
            return False
        return True


class ToyJob(NamedTuple):
    """Run the toy experiment."""

    params: Params

    def __str__(self) -> str:
        return "toy"

    @property
    def weight(self) -> float:
        """Estimated work."""
        return TOY_WORK * toy_pairs(self.params.toy)

    @property
    def is_done(self) -> bool:
        """Whether its stage is current."""
        return toy_step(self.params).is_current

    @property
    def is_ready(self) -> bool:
        """It needs nothing."""
        return True

    @property
    def holder(self) -> str | None:
        """The other process that seems to do it, if any."""
        return None

    def run(self, context: Any) -> bool:
        """Run the experiment."""
        toy(self.params, context.launch, None)
        return True


def pool(params: Params, launch: Launch) -> None:
    """Train, sample and measure the runs, guided runs and trials in params that are not current; the toy, too.

    The classifier is not among the jobs: it is an input of the trials that it guides, and shapes their identity. Large
    networks are left to their own stages, which use all cores, and everything is where a GPU is used. At the end a file
    says that the pool has run here, in any of these cases. The folder of tables, a dep of the report, is there even
    where params have no tables.
    """
    paths.table("").parent.mkdir(parents=True, exist_ok=True)
    _run_missing(params, launch)
    with atomic_path(paths.POOL_DONE) as temp:
        temp.write_text("pool\n")


def _run_missing(params: Params, launch: Launch) -> None:
    reason = _reason_against(launch)
    if reason is not None:
        print(f"No pool: {reason}; every stage does its own work.")
        return
    from afm_pipe.distributed.pool import run_jobs
    from afm_pipe.planning.counting import update_units
    from afm_pipe.study.runner import Worker, trial_jobs

    jobs: list[Any] = [RunJob(params, name) for name in pooled_runs(params)]
    jobs.append(ToyJob(params))
    names = [name for name in params.tables if not table_step(params, name).is_current]
    trials = [trial for trial in (Trials(params, names).all if names else ()) if is_small(trial.run.size)]
    first, *others = [job for job in jobs if not job.is_done] + trial_jobs(trials) or [None]
    if first is None:
        print("The pool: everything is current.")
        return
    workers = min(launch.num_workers(), 1 + len(others))
    print(
        f"The pool: {1 + len(others)} jobs, {workers} at a time with one thread each. "
        + (f"The first pictures: {paths.samples(first.name) / 'grid.png'}. " if isinstance(first, RunJob) else "")
        + "To watch: `afm-pipe report --watch`."
    )
    ordered = [first, *sorted(others, key=lambda job: -job.weight)]  # the first run's pictures come first
    track("pool", run_jobs(ordered, Worker(params, launch, update_units), launch.num_workers(), "jobs"))


def pooled_runs(params: Params) -> list[str]:
    """Return the names of the runs that the pool trains: the small ones whose base, if any, it trains too.

    DVC may import weights only after the pool, so runs that continue them are left to their own stages.
    """
    late = {name for name, guided in params.guided.items() if guided.base in params.imported}
    return [name for name, run in params.models.items() if is_small(run.size) and name not in late]


def time_text(params: Params, launch: Launch) -> str:
    """Return how long all stages take on this machine. Raises UserError before `prepare` has counted the images."""
    from afm_pipe.data.manifest import read_manifest
    from afm_pipe.planning.here import estimate

    if not paths.MANIFEST.exists():
        raise UserError(
            f"Found no {paths.MANIFEST}, expected the images that `prepare` counts: run `dvc repro prepare`."
        )
    reason = _reason_against(launch)
    apart = [name for name in params.models if name not in pooled_runs(params)]
    if reason is not None or apart:
        why = reason or f"{apart[0]} is not trained by the pool"
        return f"Time left: each stage says it ({why}); `afm-pipe plan --measure` estimates it before."
    manifest = read_manifest(paths.MANIFEST)
    return estimate(params, launch, manifest.num_images, len(manifest.classes))


def _reason_against(launch: Launch) -> str | None:
    if launch.world_size > 1 or env_world_size() > 1:
        return "the launch settings ask for several processes per run"
    if launch.torch_device().type != "cpu":
        return f"the device is {launch.torch_device()}"
    return "there is one worker" if launch.num_workers() < 2 else None


def toy_pairs(toy: Toy) -> int:
    """Return the pairs of updates of the toy experiment: of the GAN, each step count, the sweep, and guidance."""
    return (1 + len(toy.steps) + len(toy.sweep)) * toy.pairs + 3 * toy.guidance.pairs
