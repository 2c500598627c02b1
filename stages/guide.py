"""Continue a trained run with its guided phase, into models/RUN, with its curves and its cost.

    python stages/guide.py t4-guided
    dvc repro guide@t4-guided

To resume, run the same command again.
"""

import typer

from afm_pipe import pipeline
from afm_pipe.console import guarded
from afm_pipe.launch import load_launch
from afm_pipe.launcher import on_ranks
from afm_pipe.params_file import load_params


@guarded
def main(run: str) -> None:
    pipeline.train(load_params(), run, on_ranks(load_launch()))


if __name__ == "__main__":
    typer.run(main)
