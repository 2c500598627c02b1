"""Measure the real images into reference/: what samples are held against.

python stages/reference.py
dvc repro reference
"""

import typer

from afm_pipe import pipeline
from afm_pipe.console import guarded
from afm_pipe.launch import load_launch
from afm_pipe.params_file import load_params


@guarded
def main() -> None:
    pipeline.reference(load_params(), load_launch())


if __name__ == "__main__":
    typer.run(main)
