"""The commands of `afm-pipe`, in the order of --help. Heavy imports happen inside the command that needs them."""

from afm_pipe.cli import stages, results, studies  # noqa: F401, I001  # each registers its commands
from afm_pipe.cli.base import app

__all__ = ["app"]
