"""How a command ends: a user error or a signal becomes one line on stderr, printed once for all processes."""

import errno
import functools
import io
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from afm_pipe.runtime.environment import env_rank, env_world_size
from afm_pipe.runtime.errors import RankLostError, UnwritableError, UserError, describe_denied
from afm_pipe.runtime.signals import Stopped, graceful_shutdown, stop_with_dvc

P = ParamSpec("P")
HEAD_START = 5.0  # seconds for the main process to print its message before the others do


def user_command(command: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command: a UserError or a denied permission becomes one line on stderr and exit code 1.

    A signal becomes one line and the exit code that `Stopped.code` gives.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed by the caller, as `2>&-` does
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a console of another encoding shows ? for what it lacks
        try:
            with graceful_shutdown():
                stop_with_dvc()
                command(*args, **kwargs)
                sys.stdout.flush()
        except Stopped as stopped:
            end(str(stopped), stopped.code, agreed=True)
        except UserError as error:
            denied = None if isinstance(error, UnwritableError) else _denied(error)
            end(f"error: {describe_denied(denied) if denied else error}", 1, lost=isinstance(error, RankLostError))
        except PermissionError as error:
            end(f"error: {describe_denied(error)}", 1)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            where = error.filename or "the output or a file"
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in its buffer
            end(
                f"error: Found {where} not writable ({error.strerror}): free disk space, run the same command again.", 1
            )

    return run


def _denied(error: BaseException | None) -> PermissionError | None:
    """Return the denied permission that a loader took for a damaged file."""
    while error is not None and not isinstance(error, PermissionError):
        error = error.__context__
    return error


def end(message: str, code: int, agreed: bool = False, lost: bool = False) -> NoReturn:
    """Print why this process ends, once per process group, and exit with `code`.

    `agreed`: all processes end together, and only the main process prints. Otherwise the main process gets a head
    start, since the launcher kills the group as soon as one process exits. `lost`: another process died, which the
    launcher reports.
    """
    if env_world_size() == 1:
        print(message, file=sys.stderr)
        raise SystemExit(code)
    if env_rank() > 0 and not agreed:
        time.sleep(HEAD_START)
    if not (agreed and env_rank() > 0 or lost and "TORCHELASTIC_RUN_ID" in os.environ):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # interpreter teardown with torch takes seconds, during which the others would wait
