"""Make a model from weights trained elsewhere, into models/NAME.

python stages/import.py NAME
dvc repro import@NAME
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main(name: str) -> None:
    pipeline.import_weights(load_params(), name)


if __name__ == "__main__":
    typer.run(main)
