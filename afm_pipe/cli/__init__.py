"""`afm-pipe`: the pipeline's stages and a few tools for a person at a prompt.

    afm-pipe --help
    afm-pipe train t4 --dry-run
    afm-pipe train --size t4 --set train.batch_size=32
    afm-pipe train --size t4 --nproc-per-node 2
    afm-pipe doctor

Long-running commands go on where they stopped: to resume, run the same command again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afm_pipe.runtime import paths
from afm_pipe.runtime.commands import user_command
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.lazy import Lazy

if TYPE_CHECKING:
    from afm_pipe import pipeline
    from afm_pipe.cli import plan as answers
    from afm_pipe.distributed import launch
    from afm_pipe.distributed import torchrun as launcher
    from afm_pipe.distributed.launch import Launch
    from afm_pipe.params import Params
    from afm_pipe.params import file as params_file
else:  # imported by the command that needs them: --help needs none
    answers, launch, launcher, params_file, pipeline = (
        Lazy(f"afm_pipe.{name}") for name in ("answers", "launch", "launcher", "params_file", "pipeline")
    )

app = typer.Typer(
    help="Adversarial Flow Models as one declarative pipeline. `dvc repro` runs all stages; these run one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DATA, RUN, TOOL = "Data stages", "Run stages", "Tools"

ParamsFile = Annotated[Path, typer.Option("--params", help="The params file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a param; may be given several times.")
]
Nproc = Annotated[
    int | None, typer.Option("--nproc-per-node", help="So many processes here share the work, a GPU or a core each.")
]
MicroBatch = Annotated[
    int | None, typer.Option("--micro-batch", help="Images a device takes at once; the numbers stay the same.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run that params names.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="A model under models/: a run, or an imported one.")]


@app.command(rich_help_panel=DATA)
@user_command
def prepare(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Check, count and hash the images.  Example: afm-pipe prepare"""
    pipeline.prepare(load_params(params, overrides or ()))


@app.command(rich_help_panel=DATA)
@user_command
def autoencoder(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Train or fetch the autoencoder.  Example: afm-pipe autoencoder --set autoencoder.train.updates=200"""
    pipeline.autoencoder(load_params(params, overrides or ()), load_launch())


@app.command(rich_help_panel=DATA)
@user_command
def encode(nproc: Nproc = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Encode the images to latents; resumable.  Example: afm-pipe encode"""
    pipeline.encode(load_params(params, overrides or ()), launch_processes(nproc))


@app.command(rich_help_panel=DATA)
@user_command
def reference(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Measure the real images.  Example: afm-pipe reference"""
    pipeline.reference(load_params(params, overrides or ()), load_launch())


@app.command(rich_help_panel=DATA)
@user_command
def classifier(
    nproc: Nproc = None, micro_batch: MicroBatch = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None
) -> None:
    """Train the classifier that guides; resumable.  Example: afm-pipe classifier"""
    pipeline.classifier(load_params(params, overrides or ()), launch_processes(nproc, micro_batch))


@app.command(rich_help_panel=RUN)
@user_command
def train(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run that params names.")] = None,
    size: Annotated[str | None, typer.Option(help="Train the run that is named like this size.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained and what it needs.")] = False,
    nproc: Nproc = None,
    micro_batch: MicroBatch = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Train a run; resumable.  Example: afm-pipe train --size t4 --nproc-per-node 2"""
    loaded = load_params(params, overrides or ())
    name = _named(loaded, run, size)
    if dry_run:
        typer.echo(answers.plan(loaded, name, load_launch(nproc, micro_batch)))
    else:
        pipeline.train(loaded, name, launch_processes(nproc, micro_batch))


@app.command(rich_help_panel=RUN)
@user_command
def guide(
    run: RunName,
    nproc: Nproc = None,
    micro_batch: MicroBatch = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Continue a trained run with its guided phase; resumable.  Example: afm-pipe guide t4-guided"""
    loaded = load_params(params, overrides or ())
    if run not in loaded.guided:
        raise UserError(f"Found no guided run {run!r} in params, expected one of {', '.join(loaded.guided) or 'none'}.")
    pipeline.train(loaded, run, launch_processes(nproc, micro_batch))


@app.command(rich_help_panel=RUN)
@user_command
def sample(
    run: ModelName,
    classes: Annotated[str | None, typer.Option(help="Classes by number or name, with commas between.")] = None,
    seed: Annotated[int | None, typer.Option(help="Image i comes from seed + i.")] = None,
    per_class: Annotated[int | None, typer.Option(help="So many images of each class, in rows.")] = None,
    count: Annotated[int | None, typer.Option(help="So many images in all, classes in turn.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps from noise to image, for models of any number.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Write one picture, a PNG file.")] = None,
    images: Annotated[Path | None, typer.Option(help="Write numbered PNG files into this folder.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Write arr_0 (N, H, W, C) and labels into one file.")] = None,
    interpolate: Annotated[str | None, typer.Option(help="Draw strips between these seeds, as in 0,1,2.")] = None,
    frames: Annotated[int, typer.Option(help="Pictures from one seed to the next, both shown.")] = 8,
    nproc: Nproc = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Draw samples, by default the report's grid.  Example: afm-pipe sample t4 --classes 3,7 --grid out.png"""
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
    pipeline.sample(load_params(params, overrides or ()), run, launch_processes(nproc), request)


@app.command(rich_help_panel=RUN)
@user_command
def evaluate(run: RunName, nproc: Nproc = None, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Measure a run's samples.  Example: afm-pipe evaluate t4"""
    pipeline.evaluate(load_params(params, overrides or ()), run, launch_processes(nproc))


@app.command(rich_help_panel=RUN)
@user_command
def tables(
    names: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...", help="Tables of params; or all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write them into this folder instead of tables/.")] = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Train and measure tables; resumable.  Example: afm-pipe tables transport_decay"""
    pipeline.tables(load_params(params, overrides or ()), names or [], load_launch(), out)


@app.command(rich_help_panel=TOOL)
@user_command
def toy(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Run the study on a line.  Example: afm-pipe toy --set toy.pairs=5000"""
    pipeline.toy(load_params(params, overrides or ()), load_launch())


@app.command(rich_help_panel=RUN)
@user_command
def report(
    watch: Annotated[bool, typer.Option("--watch", help="Show what is training now, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: so many seconds between pages.")] = 5.0,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Write the page and the tables, or watch a training.  Example: afm-pipe report --watch"""
    loaded = load_params(params, overrides or ())
    if watch:
        answers.watch(loaded, every)
    else:
        pipeline.report(loaded)


@app.command(rich_help_panel=RUN)
@user_command
def status(params: ParamsFile = paths.PARAMS) -> None:
    """Show all runs: state, phase, progress, time left, health.  Example: afm-pipe status"""
    from afm_pipe.cli.why import status_text

    typer.echo(status_text(load_params(params)))


@app.command(rich_help_panel=RUN)
@user_command
def why(run: RunName, params: ParamsFile = paths.PARAMS) -> None:
    """Say what happened to a run and what to try; exits with 3 where it failed.  Example: afm-pipe why t4"""
    from afm_pipe.cli.why import why as explained

    text, code = explained(load_params(params), run)
    typer.echo(text)
    raise typer.Exit(code)


@app.command("import", rich_help_panel=TOOL)
@user_command
def import_weights(
    file: Annotated[str, typer.Argument(help="Weights: .pth, .pt or .safetensors.")],
    name: Annotated[str, typer.Option(help="What the model will be called: models/NAME.")],
    nfe: Annotated[str | None, typer.Option(help="Steps it was trained for, where its tensors leave it open.")] = None,
    repeats: Annotated[int | None, typer.Option(help="How often its blocks run: 1, 2 or 4.")] = None,
    form: Annotated[str | None, typer.Option(help="direct or residual, if it is not as released.")] = None,
    classes: Annotated[str | None, typer.Option(help="Text file of class names, one a line.")] = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Make a model of released weights.  Example: afm-pipe import xl2_1nfe_guided_FID2.38.pth --name xl2-released"""
    loaded = load_params(params, overrides or ())
    steps = int(nfe) if nfe is not None and nfe.isdecimal() else nfe
    told = {"file": file, "nfe": steps, "repeats": repeats, "form": form, "classes": classes}
    pipeline.import_weights(loaded, name, params_file.imported(told))


@app.command(rich_help_panel=TOOL)
@user_command
def export(
    run: ModelName,
    kind: Annotated[str, typer.Option("--format", help="released, safetensors, diffusers or adm-npz.")],
    out: Annotated[Path, typer.Option(help="The file, or for diffusers the folder, to write.")],
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Write a model for others, or its samples (adm-npz).  Example: afm-pipe export t4 --format adm-npz --out t4.npz"""
    if kind == "adm-npz":
        pipeline.export_samples(load_params(params, overrides or ()), run, load_launch(), out)
    else:
        pipeline.export(run, kind, out)


@app.command(rich_help_panel=TOOL)
@user_command
def plan(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs that params names; or all.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="So many GPUs; they share each batch.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    utilization: Annotated[
        float, typer.Option("--utilization", "--utilisation", help="Fraction of the GPU's peak that is reached.")
    ] = 0.4,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "tf32",
    micro_batch: MicroBatch = None,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Activations are computed again instead of kept.")
    ] = False,
    shard: Annotated[bool, typer.Option("--shard", help="The GPUs share weights and optimizers out (FSDP2).")] = False,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of the data set, before `prepare` has counted them.")
    ] = None,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Estimate work, memory, days and disk; trains nothing.  Example: afm-pipe plan xl2 --gpus 8 --gpu h100"""
    loaded = load_params(params, overrides or ())
    from afm_pipe.planning.plan import machine

    planned = machine(gpu, gpus, utilization, precision, micro_batch, checkpoint, shard)
    typer.echo(answers.plan_study(loaded, runs or [], planned, images))


@app.command(rich_help_panel=TOOL)
@user_command
def profile(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A file under profiles/, without .yaml.")] = None,
) -> None:
    """Make a profile the params.yaml, keeping the old one; or list them.  Example: afm-pipe profile imagenet256"""
    from afm_pipe.params.profiles import activate, list_profiles

    if name is None:
        for each in list_profiles():
            typer.echo(f"{each.name:12} {each.words}")
        return
    switch = activate(name)
    typer.echo(f"{paths.PARAMS} is {'now' if switch.changed else 'already'} the profile {name}.")
    if switch.kept:
        typer.echo(f"The old one is {switch.kept}.")


@app.command(rich_help_panel=TOOL)
@user_command
def doctor(params: ParamsFile = paths.PARAMS) -> None:
    """Check the machine: each line ok, or a remedy.  Example: afm-pipe doctor"""
    from afm_pipe.cli.doctor import examine

    findings = examine(params)
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.ok else 'MEND'}  {finding.what}: {finding.found}")
        if not finding.ok:
            typer.echo(f"      {finding.remedy}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command(rich_help_panel=TOOL)
@user_command
def summary(params: ParamsFile = paths.PARAMS) -> None:
    """Print the run table of the last report.  Example: afm-pipe summary"""
    typer.echo(answers.summary(load_params(params)))


@app.command(rich_help_panel=TOOL, context_settings={"ignore_unknown_options": True})
@user_command
def sbatch(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="What to run, without afm-pipe.")],
    nodes: Annotated[int, typer.Option(min=1, help="So many machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 8,
    time: Annotated[str, typer.Option(help="After it the job is queued again: a time limit of SLURM.")] = "24:00:00",
) -> None:
    """Print a script for SLURM, requeued when preempted.  Example: afm-pipe sbatch train xl2 --nodes 2 > xl2.sbatch"""
    from afm_pipe.distributed.sbatch import batch_script

    typer.echo(batch_script(command, nodes, gpus, time), nl=False)


@app.command(rich_help_panel=TOOL)
def schema() -> None:
    """Print the JSON schema of params.yaml.  Example: afm-pipe schema > params.schema.json"""
    typer.echo(params_file.json_schema(), nl=False)


def main() -> None:
    """Run the command line."""
    app()


def load_params(path: Path, overrides: Sequence[str] = ()) -> "Params":
    """Read the params file, with overrides laid over it."""
    return params_file.load_params(path, overrides)


def load_launch(nproc: int | None = None, micro_batch: int | None = None) -> "Launch":
    """Return the settings of this machine."""
    return launch.load_launch(nproc_per_node=nproc, micro_batch=micro_batch)


def launch_processes(nproc: int | None, micro_batch: int | None = None) -> "Launch":
    """Return the launch settings with the flags of a command; where they ask for several ranks, in each of these."""
    return launcher.launch_processes(load_launch(nproc, micro_batch))


def _named(params: "Params", run: str | None, size: str | None) -> str:
    """Return the run asked for by name or by size."""
    if (run is None) == (size is None):
        raise UserError("Found " + ("both RUN and --size" if run else "neither RUN nor --size") + ", expected one.")
    if run is not None:
        return run
    assert size is not None
    if size in params.runs and params.runs[size].size == size:
        return size
    of_size = [name for name, each in params.runs.items() if each.size == size]
    if of_size:
        raise UserError(f"Found no run named {size}, but runs of that size: {', '.join(of_size)}. Name one as RUN.")
    sizes = sorted({each.size for each in params.runs.values()})
    raise UserError(
        f"Found no run of size {size!r}, expected one of {', '.join(sizes)}: add a run with `size: {size}` to params."
    )
