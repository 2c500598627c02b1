"""Run the 1-D toy experiment, into results/toy/.

python stages/toy.py
dvc repro toy
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.distributed.launch import load_launch
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main() -> None:
    pipeline.toy(load_params(), load_launch(), None)


if __name__ == "__main__":
    typer.run(main)
