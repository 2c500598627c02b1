"""Check, count and hash the images, into data/manifest.json; say how long all stages take.

python stages/prepare.py
dvc repro prepare
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.distributed.launch import load_launch
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main() -> None:
    params = load_params()
    pipeline.prepare(params)
    print(pipeline.time_text(params, load_launch()))


if __name__ == "__main__":
    typer.run(main)
