"""The command line `afm-pipe`: one command per stage, and tools for a person at a prompt.

    afm-pipe --help
    afm-pipe train t4 --dry-run
    afm-pipe train --size t4 --set train.batch_size=32
    afm-pipe train --size t4 --nproc-per-node 2
    afm-pipe doctor

To resume a long-running command, run the same command again.
"""


def main() -> None:
    """Run the command line."""
    from afm_pipe.cli.app import app

    app(prog_name="afm-pipe")
