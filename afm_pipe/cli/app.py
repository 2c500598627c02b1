"""The commands of `afm-pipe`. Heavy imports happen inside the command that needs them, so --help is instant."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from afm_pipe.cli.usage import (
    CommandGroup,
    complete_formats,
    complete_models,
    complete_profiles,
    complete_runs,
    complete_sizes,
    complete_tables,
)
from afm_pipe.runtime import paths
from afm_pipe.runtime.commands import user_command
from afm_pipe.runtime.environment import env_rank
from afm_pipe.runtime.errors import UserError

if TYPE_CHECKING:
    from afm_pipe.distributed.launch import Launch
    from afm_pipe.params import Params

P = ParamSpec("P")

app = typer.Typer(
    help="Adversarial flow models as one declarative pipeline. `dvc repro` runs all stages; these run one.",
    no_args_is_help=True,
    cls=CommandGroup,
    pretty_exceptions_enable=False,
)
DATA, RUNS, INSPECT, MODELS, PARAMS, MACHINE = (
    "Pipeline: data",
    "Pipeline: runs",
    "Inspect",
    "Models",
    "Params",
    "Machine",
)

ParamsFile = Annotated[Path, typer.Option("--params", help="The params file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a param; repeatable.")
]
Nproc = Annotated[int | None, typer.Option("--nproc-per-node", help="Processes on this machine, one per GPU or core.")]
MicroBatch = Annotated[
    int | None, typer.Option("--micro-batch", help="Images per forward pass of a device; changes memory, not the run.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run in params.", autocompletion=complete_runs)]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A model under models/: a run or an imported model.", autocompletion=complete_models
    ),
]


def _command(panel: str, name: str | None = None, **settings: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a function as a command in a panel of --help."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def command(*args: P.args, **kwargs: P.kwargs) -> None:
            if _refresh_versions():
                typer.echo(f"{paths.VERSIONS} was of another version of afm-pipe and is up to date now.", err=True)
            function(*args, **kwargs)

        return app.command(name, rich_help_panel=panel, **settings)(user_command(command))

    return register


def _refresh_versions() -> bool:
    """Bring versions.yaml of a study outside the checkout up to date with the installed package; return whether."""
    if not paths.VERSIONS.is_file() or env_rank() > 0:
        return False
    from afm_pipe.params.versions import refresh_study_versions

    return refresh_study_versions()


def _params(path: Path, overrides: list[str] | None = None) -> "Params":
    from afm_pipe.params.file import load_params

    return load_params(path, overrides or ())


def _with_sizes(path: Path, overrides: list[str] | None = None) -> "Params":
    """Load params with the undeclared runs that `train --size` has begun."""
    from afm_pipe.params.sizes import SIZES
    from afm_pipe.runtime.files import json_value

    params = _params(path, overrides)
    begun = [
        size
        for size in SIZES
        if size not in params.names
        and (any(paths.WORK.glob(f"{size}/*/curves.csv")) or json_value(paths.model(size) / "config.json", "run"))
    ]
    return _params(path, [*(overrides or ()), *(f"runs.{size}.size={size}" for size in begun)]) if begun else params


def _launch(nproc: int | None = None, micro_batch: int | None = None) -> "Launch":
    from afm_pipe.distributed.launch import load_launch

    return load_launch(nproc_per_node=nproc, micro_batch=micro_batch)


def _start(nproc: int | None, micro_batch: int | None = None) -> "Launch":
    """Return the launch settings; if they ask for several processes, start them and return in each."""
    from afm_pipe.distributed.torchrun import launch_processes

    return launch_processes(_launch(nproc, micro_batch))


@_command(DATA)
def prepare(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Check, count and hash the images.

    Example: afm-pipe prepare
    """
    from afm_pipe import pipeline

    pipeline.prepare(_params(params, overrides))


@_command(DATA)
def autoencoder(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Train or fetch the autoencoder.

    Example: afm-pipe autoencoder --set autoencoder.train.updates=200
    """
    from afm_pipe import pipeline

    pipeline.autoencoder(_params(params, overrides), _launch())


@_command(DATA)
def encode(nproc: Nproc = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Encode the images to latents; resumable.

    Example: afm-pipe encode
    """
    from afm_pipe import pipeline

    pipeline.encode(_params(params, overrides), _start(nproc))


@_command(DATA)
def reference(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Compute the statistics of the real images.

    Example: afm-pipe reference
    """
    from afm_pipe import pipeline

    pipeline.reference(_params(params, overrides), _launch())


@_command(DATA)
def classifier(
    nproc: Nproc = None, micro_batch: MicroBatch = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None
) -> None:
    """Train the classifier used for guidance; resumable.

    Example: afm-pipe classifier
    """
    from afm_pipe import pipeline

    pipeline.classifier(_params(params, overrides), _start(nproc, micro_batch))


@_command(RUNS)
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

    loaded = _params(params, overrides)
    name = run or size
    if name is None or (run and size):
        raise UserError("Found " + ("both RUN and --size" if run else "neither RUN nor --size") + ", expected one.")
    if size is not None and size not in loaded.runs:
        from afm_pipe.params.profiles import undeclared_note

        loaded = _params(params, [*(overrides or ()), f"runs.{size}.size={size}"])
        if env_rank() == 0:
            typer.echo(undeclared_note(loaded, size), err=True)
    elif size is not None and loaded.runs[size].size != size:
        raise UserError(
            f"Found the run {size} of size {loaded.runs[size].size}: name it as RUN, or rename it in params."
        )
    if dry_run:
        typer.echo(dry_run_text(loaded, name, _launch(nproc, micro_batch)))
    else:
        pipeline.train(loaded, name, _start(nproc, micro_batch))


@_command(RUNS)
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

    pipeline.guide(_params(params, overrides), run, _start(nproc, micro_batch))


@_command(RUNS)
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
    pipeline.sample(_params(params, overrides), run, _start(nproc), request)


@_command(RUNS)
def evaluate(run: RunName, nproc: Nproc = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Measure a run's samples.

    Example: afm-pipe evaluate t4
    """
    from afm_pipe import pipeline

    pipeline.evaluate(_params(params, overrides), run, _start(nproc))


@_command(RUNS)
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

        typer.echo(trials_text(_params(params, overrides), names or []))
    else:
        pipeline.tables(_params(params, overrides), names or [], _launch(), out, worker, trial)


@_command(RUNS)
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

    pipeline.toy(_params(params, overrides), _launch(), strong)


@_command(RUNS)
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
        show_live(_with_sizes(params, overrides), every)
    else:
        pipeline.report(_params(params, overrides))


@_command(INSPECT)
def status(params: ParamsFile = paths.PARAMS) -> None:
    """Show all runs: state, phase, progress, time left, health.

    Example: afm-pipe status
    """
    from afm_pipe.cli.status import status_text

    typer.echo(status_text(_with_sizes(params)))


@_command(INSPECT)
def why(run: RunName, params: ParamsFile = paths.PARAMS) -> None:
    """Explain the state of a run and what to try; exit code 3 if it failed.

    Example: afm-pipe why t4
    """
    from afm_pipe.cli.why import why as explain

    text, code = explain(_with_sizes(params), run)
    typer.echo(text)
    raise typer.Exit(code)


@_command(INSPECT)
def summary(params: ParamsFile = paths.PARAMS) -> None:
    """Print the metrics of all measured runs.

    Example: afm-pipe summary
    """
    from afm_pipe.cli.status import summary_text

    typer.echo(summary_text(_with_sizes(params)))


@_command(INSPECT)
def gate(
    baseline: Annotated[str, typer.Argument(help="A git revision, or a folder like results/.")],
    results: Annotated[Path, typer.Option(help="The results to judge.")] = paths.RESULTS,
) -> None:
    """Compare results with a baseline; exit code 1: worse, 2: not comparable.

    Example: afm-pipe gate HEAD
    """
    from afm_pipe.reporting.gate import gate as compare

    text, code = compare(baseline, results)
    typer.echo(text)
    raise typer.Exit(code)


@_command(MODELS, "import")
def import_weights(
    file: Annotated[str, typer.Argument(help="Weights: .pth, .pt, .bin, .ckpt, .safetensors or .index.json.")],
    name: Annotated[str, typer.Option(help="Name of the new model: models/NAME.")],
    nfe: Annotated[str | None, typer.Option(help="Steps it was trained for, if its tensors do not show them.")] = None,
    repeats: Annotated[int | None, typer.Option(help="How often its blocks run: 1, 2 or 4.")] = None,
    form: Annotated[str | None, typer.Option(help="direct or residual, if not as released.")] = None,
    classes: Annotated[str | None, typer.Option(help="Text file of class names, one per line.")] = None,
    key: Annotated[str | None, typer.Option(help="Entry that holds them, such as ema; default: its EMA.")] = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make a model from released weights.

    Example: afm-pipe import xl2_1nfe_guided_FID2.38.pth --name xl2-released
    """
    from afm_pipe import pipeline
    from afm_pipe.params.file import imported

    steps = int(nfe) if nfe is not None and nfe.isdecimal() else nfe
    options = {
        "file": paths.expanded(file),
        "nfe": steps,
        "repeats": repeats,
        "form": form,
        "classes": classes,
        "key": key,
    }
    pipeline.import_weights(_params(params, overrides), name, imported(options))


@_command(MODELS)
def export(
    run: ModelName,
    kind: Annotated[
        str,
        typer.Option("--format", help="released, safetensors, diffusers or adm-npz.", autocompletion=complete_formats),
    ],
    out: Annotated[Path, typer.Option(help="File to write, or folder for diffusers.")],
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Export a model, or its samples (adm-npz).

    Example: afm-pipe export t4 --format adm-npz --out t4.npz
    """
    from afm_pipe import pipeline

    if kind == "adm-npz":
        pipeline.export_samples(_params(params, overrides), run, _launch(), out)
    else:
        pipeline.export(run, kind, out, _params(params, overrides) if params.is_file() else None)


@_command(PARAMS)
def init(
    profile: Annotated[
        str | None,
        typer.Option(
            help="The profile that becomes params.yaml; default: digits on a laptop.", autocompletion=complete_profiles
        ),
    ] = None,
    git: Annotated[bool, typer.Option("--git/--no-git", help="Use DVC in a git repository, or without.")] = True,
) -> None:
    """Begin a study in this folder: params.yaml, dvc.yaml, .gitignore.

    Example: afm-pipe init --profile smoke
    """
    from afm_pipe.params.new_study import init_study

    written = init_study(profile, git)
    typer.echo(f"Wrote {', '.join(map(str, written))}." if written else "Found this study begun already.")
    commit = "`git add -A && git commit -m 'Begin a study'`, then " if git else ""
    typer.echo(f"Next: {commit}`dvc repro` runs all stages on params.yaml; `afm-pipe status` shows the runs.")


@app.command(hidden=True)
@user_command
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="A script under stages/, without .py.")],
    key: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A run, table or model in params.")] = None,
) -> None:
    """Run a stage as DVC does in a study outside the checkout.

    Example: afm-pipe stage train t4
    """
    from afm_pipe.params.new_study import stage_script

    script = stage_script(name)
    if _refresh_versions():
        raise UserError(
            f"Found {paths.VERSIONS} of another version of afm-pipe, expected that of the installed one, by which DVC "
            "decides what to run. It is up to date now: run `dvc repro` again."
        )
    os.execv(sys.executable, [sys.executable, str(script), *filter(None, [key])])


@_command(PARAMS)
def profile(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A file under profiles/, without .yaml.", autocompletion=complete_profiles
        ),
    ] = None,
) -> None:
    """Replace params.yaml by a profile, keeping a copy; or list profiles.

    Example: afm-pipe profile imagenet256
    """
    from afm_pipe.params.profiles import activate, list_profiles

    if name is None:
        for each in list_profiles():
            typer.echo(f"{each.name:12} {each.description}")
        return
    switch = activate(name)
    typer.echo(f"{paths.PARAMS} is {'now' if switch.changed else 'already'} the profile {name}.")
    if switch.backup:
        typer.echo(f"The old one is {switch.backup}.")


@_command(PARAMS)
def migrate(
    file: Annotated[Path, typer.Argument(help="A params file of version 0.1.")] = paths.PARAMS,
) -> None:
    """Rename the keys of a params file of version 0.1, keeping a copy.

    Example: afm-pipe migrate params.yaml
    """
    from afm_pipe.params.migrate import migrate as rewrite

    keys, kept = rewrite(file)
    for key in keys:
        typer.echo(key)
    typer.echo(f"{file}: {len(keys)} keys rewritten; the old file is {kept}." if kept else f"{file} is up to date.")
    if keys and paths.LATENTS.is_file():
        typer.echo(f"To keep {paths.LATENTS} of version 0.1: dvc commit -f prepare autoencoder encode")


@_command(PARAMS)
def schema() -> None:
    """Print the JSON schema of params.yaml.

    Example: afm-pipe schema > params.schema.json
    """
    from afm_pipe.params.file import json_schema

    typer.echo(json_schema(), nl=False)


@_command(MACHINE)
def doctor(params: ParamsFile = paths.PARAMS) -> None:
    """Check the machine: each line is ok or says what to do.

    Example: afm-pipe doctor
    """
    from afm_pipe.cli.doctor import examine

    findings = examine(params)
    for finding in findings:
        typer.echo(f"{'ok ' if finding.ok else 'FIX'}  {finding.what}: {finding.found}")
        if not finding.ok:
            typer.echo(f"     {finding.remedy}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@_command(MACHINE)
def plan(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs in params; default: all.", autocompletion=complete_runs),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs; they share each batch.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    utilization: Annotated[
        float | None,
        typer.Option("--utilization", "--utilisation", help="Fraction of the GPU's peak that training reaches."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a few updates of the first run here, and plan with their rate.")
    ] = False,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "tf32",
    micro_batch: MicroBatch = None,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Recompute activations in the backward pass.")
    ] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Shard weights and optimizers over the GPUs (FSDP2).")] = False,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images, before `prepare` has counted them.")
    ] = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Estimate FLOPs, memory, days and disk.

    Example: afm-pipe plan xl2 --gpus 8 --gpu h100
    """
    from afm_pipe.cli.plan import plan_text
    from afm_pipe.distributed.launch import load_launch
    from afm_pipe.planning.plan import UTILIZATIONS, Machine

    least, most = UTILIZATIONS.get(precision, (1.0, 1.0)) if utilization is None else (None, utilization)
    machine = Machine(gpu, gpus, most, precision, micro_batch, checkpoint, shard, least)
    launch = load_launch() if measure else None
    typer.echo(plan_text(_params(params, overrides), runs or [], machine, images, launch))


@_command(MACHINE, context_settings={"ignore_unknown_options": True})
def sbatch(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="The command, without afm-pipe.")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs per machine, 8 by default; per trial of tables, by default 0: one core."),
    ] = None,
    time: Annotated[str, typer.Option(help="SLURM time limit, after which the job is requeued.")] = "24:00:00",
    at_once: Annotated[int, typer.Option(min=1, help="Trials of tables that run at a time.")] = 64,
) -> None:
    """Print a SLURM script that requeues when preempted; of tables, an array.

    Example: afm-pipe sbatch train xl2
    """
    from afm_pipe.distributed.sbatch import array_script, batch_script

    if command[0] == "tables":
        from afm_pipe.study.runner import trial_jobs
        from afm_pipe.study.trials import Trials

        options = typer.main.get_command(app).commands["tables"].make_context("tables", command[1:]).params  # type: ignore[attr-defined]
        trials = Trials(_params(options["params"], options["overrides"]), options["names"] or [])
        missing = list(dict.fromkeys(job.group[0].training for job in trial_jobs(trials.all)))
        if not missing:
            raise UserError("Found no missing trial: run `afm-pipe tables` to write the tables.")
        typer.echo(array_script(command, missing, gpus or 0, time, at_once), nl=False)
    else:
        typer.echo(batch_script(command, nodes, 8 if gpus is None else max(gpus, 1), time), nl=False)
