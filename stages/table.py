"""Train and measure the trials of a table, into results/tables/TABLE.json.

    python stages/table.py transport_decay
    dvc repro table@transport_decay

To resume, run the same command again.
"""

import _tree  # noqa: F401
import typer

from afm_pipe import pipeline
from afm_pipe.distributed.launch import load_launch
from afm_pipe.params.file import load_params
from afm_pipe.runtime.commands import user_command


@user_command
def main(table: str) -> None:
    pipeline.tables(load_params(), [table], load_launch())


if __name__ == "__main__":
    typer.run(main)
