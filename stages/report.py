"""Write the page and the tables, into results/report/ and results/rendered/.

python stages/report.py
dvc repro report
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main() -> None:
    pipeline.report(load_params())


if __name__ == "__main__":
    typer.run(main)
