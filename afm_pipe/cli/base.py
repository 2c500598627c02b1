"""The application `afm-pipe`, the options that its commands share, and how they read params and launch settings."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from afm_pipe.cli.usage import (
    CommandGroup,
    complete_models,
    complete_runs,
)
from afm_pipe.runtime import paths
from afm_pipe.runtime.commands import user_command
from afm_pipe.runtime.environment import env_rank

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
    int | None,
    typer.Option("--micro-batch", min=1, help="Images per forward pass of a device; changes memory, not the run."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run in params.", autocompletion=complete_runs)]
ModelName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A model under models/: a run or an imported model.", autocompletion=complete_models
    ),
]


def command(panel: str, name: str | None = None, **settings: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a function as a command in a panel of --help."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def refreshed(*args: P.args, **kwargs: P.kwargs) -> None:
            if refresh_versions():
                typer.echo(f"{paths.VERSIONS} was of another version of afm-pipe and is up to date now.", err=True)
            function(*args, **kwargs)

        return app.command(name, rich_help_panel=panel, **settings)(user_command(refreshed))

    return register


def refresh_versions() -> bool:
    """Bring versions.yaml of a study outside the checkout up to date with the installed package; return whether."""
    if not paths.VERSIONS.is_file() or env_rank() > 0:
        return False
    from afm_pipe.params.versions import refresh_study_versions

    return refresh_study_versions()


def read_params(path: Path, overrides: list[str] | None = None) -> "Params":
    """Load params with the overrides of a command line."""
    from afm_pipe.params.file import load_params

    return load_params(path, overrides or ())


def params_with_sizes(path: Path, overrides: list[str] | None = None) -> "Params":
    """Load params with the undeclared runs that `train --size` has begun."""
    from afm_pipe.params.sizes import SIZES
    from afm_pipe.runtime.files import json_value

    params = read_params(path, overrides)
    begun = [
        size
        for size in SIZES
        if size not in params.names
        and (any(paths.WORK.glob(f"{size}/*/curves.csv")) or json_value(paths.model(size) / "config.json", "run"))
    ]
    return read_params(path, [*(overrides or ()), *(f"runs.{size}.size={size}" for size in begun)]) if begun else params


def launch_settings(nproc: int | None = None, micro_batch: int | None = None) -> "Launch":
    """Load the launch settings with the flags of a command line."""
    from afm_pipe.distributed.launch import load_launch

    return load_launch(nproc_per_node=nproc, micro_batch=micro_batch)


def start_processes(nproc: int | None, micro_batch: int | None = None) -> "Launch":
    """Return the launch settings; if they ask for several processes, start them and return in each."""
    from afm_pipe.distributed.torchrun import launch_processes

    return launch_processes(launch_settings(nproc, micro_batch))
