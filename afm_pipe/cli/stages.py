"""Commands that run a stage of the pipeline."""

from pathlib import Path
from typing import Annotated

import typer

from afm_pipe.cli.base import (
    DATA,
    RUNS,
    MicroBatch,
    ModelName,
    Nproc,
    Overrides,
    ParamsFile,
    RunName,
    command,
    launch_settings,
    params_with_sizes,
    read_params,
    start_processes,
)
from afm_pipe.cli.usage import complete_runs, complete_sizes, complete_tables
from afm_pipe.runtime import paths
from afm_pipe.runtime.environment import env_rank
from afm_pipe.runtime.errors import UserError


@command(DATA)
def prepare(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Check, count and hash the images.

    Example: afm-pipe prepare
    """
    from afm_pipe import pipeline

    pipeline.prepare(read_params(params, overrides))


@command(DATA)
def autoencoder(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Train or fetch the autoencoder.

    Example: afm-pipe autoencoder --set autoencoder.train.updates=200
    """
    from afm_pipe import pipeline

    pipeline.autoencoder(read_params(params, overrides), launch_settings())


@command(DATA)
def encode(nproc: Nproc = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Encode the images to latents; resumable.

    Example: afm-pipe encode
    """
    from afm_pipe import pipeline

    pipeline.encode(read_params(params, overrides), start_processes(nproc))


@command(DATA)
def reference(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Compute the statistics of the real images.

    Example: afm-pipe reference
    """
    from afm_pipe import pipeline

    pipeline.reference(read_params(params, overrides), launch_settings())


@command(DATA)
def classifier(
    nproc: Nproc = None, micro_batch: MicroBatch = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None
) -> None:
    """Train the classifier used for guidance; resumable.

    Example: afm-pipe classifier
    """
    from afm_pipe import pipeline

    pipeline.classifier(read_params(params, overrides), start_processes(nproc, micro_batch))


@command(RUNS)
def train(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run in params.", autocompletion=complete_runs)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Train the run named like this model size; undeclared, with the settings of train.",
            autocompletion=complete_sizes,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print params, parameters, updates and memory.")] = False,
    nproc: Nproc = None,
    micro_batch: MicroBatch = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Train a run; resumable.

    Example: afm-pipe train --size t4 --nproc-per-node 2
    """
    from afm_pipe import pipeline
    from afm_pipe.cli.plan import dry_run_text

    loaded = read_params(params, overrides)
    name = run or size
    if name is None or (run and size):
        raise UserError("Found " + ("both RUN and --size" if run else "neither RUN nor --size") + ", expected one.")
    if size is not None and size not in loaded.runs:
        from afm_pipe.params.profiles import undeclared_note

        loaded = read_params(params, [*(overrides or ()), f"runs.{size}.size={size}"])
        if env_rank() == 0:
            typer.echo(undeclared_note(loaded, size), err=True)
    elif size is not None and loaded.runs[size].size != size:
        raise UserError(
            f"Found the run {size} of size {loaded.runs[size].size}: name it as RUN, or rename it in params."
        )
    if dry_run:
        typer.echo(dry_run_text(loaded, name, launch_settings(nproc, micro_batch)))
    else:
        pipeline.train(loaded, name, start_processes(nproc, micro_batch))


@command(RUNS)
def guide(
    run: RunName,
    nproc: Nproc = None,
    micro_batch: MicroBatch = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Continue a trained run with its guided phase; resumable.

    Example: afm-pipe guide s4-guided
    """
    from afm_pipe import pipeline

    pipeline.guide(read_params(params, overrides), run, start_processes(nproc, micro_batch))


@command(RUNS)
def sample(
    run: ModelName,
    classes: Annotated[str | None, typer.Option(help="Class numbers or names, separated by commas.")] = None,
    seed: Annotated[int | None, typer.Option(help="Image i uses seed + i.")] = None,
    per_class: Annotated[int | None, typer.Option(help="Images per class, in rows.")] = None,
    count: Annotated[int | None, typer.Option(help="Total number of images, cycling through the classes.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps, for any-step models.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Write one grid as a PNG file.")] = None,
    images: Annotated[Path | None, typer.Option(help="Write numbered PNG files into this folder.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Write arr_0 (N, H, W, C) and labels into one file.")] = None,
    interpolate: Annotated[str | None, typer.Option(help="Interpolate between these seeds, such as 0,1,2.")] = None,
    frames: Annotated[int, typer.Option(help="Frames from one seed to the next, both included.")] = 8,
    nproc: Nproc = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Draw samples, by default the report's grid.

    Example: afm-pipe sample t4 --classes 3,7 --grid out.png
    """
    from afm_pipe import pipeline
    from afm_pipe.sampling.requests import Request

    request = Request(
        classes=classes,
        seed=seed,
        per_class=per_class,
        count=count,
        steps=steps,
        grid=grid,
        images=images,
        npz=npz,
        interpolate=interpolate,
        frames=frames,
    )
    pipeline.sample(read_params(params, overrides), run, start_processes(nproc), request)


@command(RUNS)
def evaluate(
    run: ModelName, nproc: Nproc = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None
) -> None:
    """Measure the samples of a run or an imported model.

    Example: afm-pipe evaluate t4
    """
    from afm_pipe import pipeline

    pipeline.evaluate(read_params(params, overrides), run, start_processes(nproc))


@command(RUNS)
def tables(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE]...", help="Tables in params; default: all.", autocompletion=complete_tables),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write into this folder instead of results/tables/.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials with their states and costs.")] = False,
    worker: Annotated[
        bool, typer.Option("--worker", help="Join a study, on any machine that shares work/; write no tables.")
    ] = False,
    trial: Annotated[str | None, typer.Option(help="Train and measure this trial alone; see --dry-run.")] = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Train and measure the trials of tables; resumable.

    Example: afm-pipe tables transport_decay --worker
    """
    from afm_pipe import pipeline

    if dry_run:
        from afm_pipe.cli.plan import trials_text

        typer.echo(trials_text(read_params(params, overrides), names or []))
    else:
        pipeline.tables(read_params(params, overrides), names or [], launch_settings(), out, worker, trial)


@command(RUNS)
def toy(
    strong: Annotated[
        Path | None, typer.Option(help="Run the strong discriminators alone; write their numbers into this file.")
    ] = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Run the 1-D toy experiment.

    Example: afm-pipe toy --set toy.pairs=5000
    """
    from afm_pipe import pipeline

    pipeline.toy(read_params(params, overrides), launch_settings(), strong)


@command(RUNS)
def report(
    watch: Annotated[bool, typer.Option("--watch", help="Show the runs in training, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between updates of the page.")] = 5.0,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Write the page and the tables, or a live page.

    Example: afm-pipe report --watch
    """
    from afm_pipe import pipeline
    from afm_pipe.cli.status import watch as show_live

    if watch:
        show_live(params_with_sizes(params, overrides), every)
    else:
        pipeline.report(read_params(params, overrides))
