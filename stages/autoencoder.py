"""Train a small KL autoencoder on the images, or fetch the pretrained one, into models/autoencoder.

python stages/autoencoder.py
dvc repro autoencoder
"""

import typer

from afm_pipe import pipeline
from afm_pipe.console import guarded
from afm_pipe.launch import load_launch
from afm_pipe.params_file import load_params


@guarded
def main() -> None:
    pipeline.autoencoder(load_params(), load_launch())


if __name__ == "__main__":
    typer.run(main)
