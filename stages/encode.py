"""Encode the images to latent moments in data/latents.h5.

    python stages/encode.py
    dvc repro encode

To resume, run the same command again.
"""

import typer

from afm_pipe import pipeline
from afm_pipe.console import guarded
from afm_pipe.launch import load_launch
from afm_pipe.launcher import on_ranks
from afm_pipe.params_file import load_params


@guarded
def main() -> None:
    pipeline.encode(load_params(), on_ranks(load_launch()))


if __name__ == "__main__":
    typer.run(main)
