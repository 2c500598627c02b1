"""Write the page and the tables into reports/.

python stages/report.py
dvc repro report
"""

import typer

from afm_pipe import pipeline
from afm_pipe.console import guarded
from afm_pipe.params_file import load_params


@guarded
def main() -> None:
    pipeline.report(load_params())


if __name__ == "__main__":
    typer.run(main)
