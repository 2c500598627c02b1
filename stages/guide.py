"""Continue a trained run with its guided phase, into models/RUN, with its curves and cost.

    python stages/guide.py s4-guided
    dvc repro guide@s4-guided

To resume, run the same command again.
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
    pipeline.guide(load_params(), run, launch_processes(load_launch()))


if __name__ == "__main__":
    typer.run(main)
