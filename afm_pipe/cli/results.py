"""Commands that show results, and import and export models."""

from pathlib import Path
from typing import Annotated

import typer

from afm_pipe.cli.base import (
    INSPECT,
    MODELS,
    ModelName,
    Overrides,
    ParamsFile,
    RunName,
    command,
    launch_settings,
    params_with_sizes,
    read_params,
)
from afm_pipe.cli.usage import complete_formats
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError


@command(INSPECT)
def status(params: ParamsFile = paths.PARAMS) -> None:
    """Show all runs: state, phase, progress, time left, health.

    Example: afm-pipe status
    """
    from afm_pipe.cli.status import status_text

    typer.echo(status_text(params_with_sizes(params)))


@command(INSPECT)
def why(run: RunName, params: ParamsFile = paths.PARAMS) -> None:
    """Explain the state of a run and what to try; exit code 3 if it failed.

    Example: afm-pipe why t4
    """
    from afm_pipe.cli.why import why as explain

    text, code = explain(params_with_sizes(params), run)
    typer.echo(text)
    raise typer.Exit(code)


@command(INSPECT)
def summary(params: ParamsFile = paths.PARAMS) -> None:
    """Print distance and class accuracy of the measured runs; of the rows of a table of runs, over seeds.

    Example: afm-pipe summary
    """
    from afm_pipe.cli.status import summary_text

    typer.echo(summary_text(params_with_sizes(params)))


@command(INSPECT)
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


@command(INSPECT)
def compare(
    checkouts: Annotated[list[str], typer.Argument(metavar="LABEL=FOLDER...", help="Checkouts, each with a label.")],
    table: Annotated[str, typer.Option(help="The table of each to compare, without columns.")] = "runs",
    out: Annotated[Path | None, typer.Option(help="Write the merged table to this JSON file, too.")] = None,
) -> None:
    """Compare a table of several checkouts, such as one for each latent space.

    Example: afm-pipe compare TAESD=. KL=../kl --table runs
    """
    from afm_pipe.reporting.across import compare_tables

    labelled = [checkout.partition("=") for checkout in checkouts]
    wrong = next((label for label, _, folder in labelled if not (label and folder)), None)
    if wrong is not None:
        raise UserError(f"Found {wrong!r}, expected LABEL=FOLDER, such as KL=../kl.")
    typer.echo(compare_tables({label: paths.local(folder) for label, _, folder in labelled}, table, out))


@command(MODELS, "import")
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
    pipeline.import_weights(read_params(params, overrides), name, imported(options))


@command(MODELS)
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
        pipeline.export_samples(read_params(params, overrides), run, launch_settings(), out)
    else:
        pipeline.export(run, kind, out, read_params(params, overrides) if params.is_file() else None)
