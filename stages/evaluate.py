"""Measure the samples of a run into metrics/RUN.json.

python stages/evaluate.py t4
dvc repro evaluate@t4
"""

import typer

from afm_pipe import pipeline
from afm_pipe.console import guarded
from afm_pipe.launch import load_launch
from afm_pipe.launcher import on_ranks
from afm_pipe.params_file import load_params


@guarded
def main(run: str) -> None:
    pipeline.evaluate(load_params(), run, on_ranks(load_launch()))


if __name__ == "__main__":
    typer.run(main)
