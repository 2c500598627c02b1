"""Train and measure the cells of one table of the study, those that no other table has done, into tables/TABLE.json.

    python stages/table.py transport_decay
    dvc repro table@transport_decay

To resume, run the same command again.
"""

import typer

from afm_pipe import pipeline
from afm_pipe.console import guarded
from afm_pipe.launch import load_launch
from afm_pipe.params_file import load_params


@guarded
def main(table: str) -> None:
    pipeline.tables(load_params(), [table], load_launch())


if __name__ == "__main__":
    typer.run(main)
