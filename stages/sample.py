"""Draw the sample grid of a model, into samples/NAME.

python stages/sample.py t4
dvc repro sample@t4
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.distributed.launch import load_launch
from afm_pipe.distributed.torchrun import launch_processes
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main(run: str) -> None:
    pipeline.sample(load_params(), run, launch_processes(load_launch()))


if __name__ == "__main__":
    typer.run(main)
