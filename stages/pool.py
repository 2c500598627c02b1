"""Train, sample and measure what is not current, several runs and trials at a time; the stages after it find it done.

    python stages/pool.py
    dvc repro pool

To resume, run the same command again.
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.distributed.launch import load_launch
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main() -> None:
    pipeline.pool(load_params(), load_launch())


if __name__ == "__main__":
    typer.run(main)
