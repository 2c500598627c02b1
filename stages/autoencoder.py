"""Train a small autoencoder on the images, or download a pretrained one, into models/autoencoder.

python stages/autoencoder.py
dvc repro autoencoder
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.distributed.launch import load_launch
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main() -> None:
    pipeline.autoencoder(load_params(), load_launch())


if __name__ == "__main__":
    typer.run(main)
