"""`python -m afm_pipe` is `afm-pipe`."""

from afm_pipe.cli import main

main()
