"""Commands that begin a study, change its params, and plan it on a machine."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from afm_pipe.cli.base import (
    MACHINE,
    PARAMS,
    MicroBatch,
    Overrides,
    ParamsFile,
    app,
    command,
    read_params,
    refresh_versions,
)
from afm_pipe.cli.usage import complete_profiles, complete_runs
from afm_pipe.runtime import paths
from afm_pipe.runtime.commands import user_command
from afm_pipe.runtime.errors import UserError


@command(PARAMS)
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
    if refresh_versions():
        raise UserError(
            f"Found {paths.VERSIONS} of another version of afm-pipe, expected that of the installed one, by which DVC "
            "decides what to run. It is up to date now: run `dvc repro` again."
        )
    os.execv(sys.executable, [sys.executable, str(script), *filter(None, [key])])


@command(PARAMS)
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
            typer.echo(f"{each.name:24} {each.description}")
        return
    switch = activate(name)
    typer.echo(f"{paths.PARAMS} is {'now' if switch.changed else 'already'} the profile {name}.")
    if switch.backup:
        typer.echo(f"The old one is {switch.backup}.")


@command(PARAMS)
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


@command(PARAMS)
def schema() -> None:
    """Print the JSON schema of params.yaml.

    Example: afm-pipe schema > params.schema.json
    """
    from afm_pipe.params.file import json_schema

    typer.echo(json_schema(), nl=False)


@command(MACHINE)
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


@command(MACHINE)
def plan(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs in params; default: all.", autocompletion=complete_runs),
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs; they share each batch.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    utilization: Annotated[
        float | None,
        typer.Option(
            "--utilization",
            "--utilisation",
            help="Fraction of the GPU's peak that training reaches; default: a range from published ones.",
        ),
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
    here: Annotated[bool, typer.Option("--here", help="Only say how long all stages take on this machine.")] = False,
    params: ParamsFile = paths.PARAMS,
    overrides: Overrides = None,
) -> None:
    """Estimate FLOPs, memory, days and disk.

    Example: afm-pipe plan xl2 --gpus 8 --params profiles/imagenet256.yaml
    """
    from afm_pipe import pipeline
    from afm_pipe.cli.plan import plan_text
    from afm_pipe.distributed.launch import load_launch
    from afm_pipe.planning.plan import UTILIZATIONS, Machine

    least, most = UTILIZATIONS.get(precision, (1.0, 1.0)) if utilization is None else (None, utilization)
    machine = Machine(gpu, gpus, most, precision, micro_batch, checkpoint, shard, least)
    if here:
        typer.echo(pipeline.time_text(read_params(params, overrides), load_launch()))
        return
    launch = load_launch() if measure else None
    typer.echo(plan_text(read_params(params, overrides), runs or [], machine, images, launch))


@command(MACHINE, context_settings={"ignore_unknown_options": True})
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
        trials = Trials(read_params(options["params"], options["overrides"]), options["names"] or [])
        missing = list(dict.fromkeys(job.group[0].training for job in trial_jobs(trials.all)))
        if not missing:
            raise UserError("Found no missing trial: run `afm-pipe tables` to write the tables.")
        typer.echo(array_script(command, missing, gpus or 0, time, at_once), nl=False)
    else:
        typer.echo(batch_script(command, nodes, 8 if gpus is None else max(gpus, 1), time), nl=False)
