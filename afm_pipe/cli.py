"""`afm-pipe`: the pipeline's stages and a few tools for a person at a prompt.

    afm-pipe --help
    afm-pipe train t4 --dry-run
    afm-pipe train --size t4 --set train.batch_size=32
    afm-pipe doctor

Long-running commands go on where they stopped: to resume, run the same command again.
"""

from pathlib import Path
from typing import Annotated

import typer

from afm_pipe import paths, pipeline
from afm_pipe.console import guarded
from afm_pipe.errors import UserError
from afm_pipe.launch import load_launch
from afm_pipe.params import Params
from afm_pipe.params_file import json_schema, load_params

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
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run that params names.")]


@app.command(rich_help_panel=DATA)
@guarded
def prepare(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Check, count and hash the images.  Example: afm-pipe prepare"""
    pipeline.prepare(load_params(params, overrides or ()))


@app.command(rich_help_panel=DATA)
@guarded
def autoencoder(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Train or fetch the autoencoder.  Example: afm-pipe autoencoder --set autoencoder.train.updates=200"""
    pipeline.autoencoder(load_params(params, overrides or ()), load_launch())


@app.command(rich_help_panel=DATA)
@guarded
def encode(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Encode the images to latents; resumable.  Example: afm-pipe encode"""
    pipeline.encode(load_params(params, overrides or ()), load_launch())


@app.command(rich_help_panel=DATA)
@guarded
def reference(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Measure the real images.  Example: afm-pipe reference"""
    pipeline.reference(load_params(params, overrides or ()), load_launch())


@app.command(rich_help_panel=DATA)
@guarded
def classifier(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Train the classifier that guides; resumable.  Example: afm-pipe classifier"""
    pipeline.classifier(load_params(params, overrides or ()), load_launch())


@app.command(rich_help_panel=RUN)
@guarded
def train(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run that params names.")] = None,
    size: Annotated[str | None, typer.Option(help="Train the run that is named like this size.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained and what it needs.")] = False,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Train a run; resumable.  Example: afm-pipe train --size t4 --dry-run"""
    loaded = load_params(params, overrides or ())
    name = _named(loaded, run, size)
    if dry_run:
        typer.echo(pipeline.plan(loaded, name))
    else:
        pipeline.train(loaded, name, load_launch())


@app.command(rich_help_panel=RUN)
@guarded
def guide(run: RunName, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Continue a trained run with its guided phase; resumable.  Example: afm-pipe guide t4-guided"""
    loaded = load_params(params, overrides or ())
    if run not in loaded.guided:
        raise UserError(f"Found no guided run {run!r} in params, expected one of {', '.join(loaded.guided) or 'none'}.")
    pipeline.train(loaded, run, load_launch())


@app.command(rich_help_panel=RUN)
@guarded
def sample(run: RunName, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Draw a run's sample grid.  Example: afm-pipe sample t4 --set sample.seed=7"""
    pipeline.sample(load_params(params, overrides or ()), run, load_launch())


@app.command(rich_help_panel=RUN)
@guarded
def evaluate(run: RunName, params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Measure a run's samples.  Example: afm-pipe evaluate t4"""
    pipeline.evaluate(load_params(params, overrides or ()), run, load_launch())


@app.command(rich_help_panel=RUN)
@guarded
def report(params: ParamsFile = paths.PARAMS, overrides: Overrides = None) -> None:
    """Write the page and the tables.  Example: afm-pipe report"""
    pipeline.report(load_params(params, overrides or ()))


@app.command(rich_help_panel=TOOL)
@guarded
def doctor(params: ParamsFile = paths.PARAMS) -> None:
    """Check the machine: each line ok, or a remedy.  Example: afm-pipe doctor"""
    from afm_pipe.doctor import examine

    findings = examine(params)
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.ok else 'MEND'}  {finding.what}: {finding.found}")
        if not finding.ok:
            typer.echo(f"      {finding.remedy}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@app.command(rich_help_panel=TOOL)
@guarded
def summary(params: ParamsFile = paths.PARAMS) -> None:
    """Print the run table of the last report.  Example: afm-pipe summary"""
    typer.echo(pipeline.summary(load_params(params)))


@app.command(rich_help_panel=TOOL)
def schema() -> None:
    """Print the JSON schema of params.yaml.  Example: afm-pipe schema > params.schema.json"""
    typer.echo(json_schema(), nl=False)


def main() -> None:
    """Run the command line."""
    app()


def _named(params: Params, run: str | None, size: str | None) -> str:
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
