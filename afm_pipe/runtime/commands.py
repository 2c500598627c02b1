"""How a command ends: a user's mistake and a termination signal are one line each, printed once for all processes."""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from afm_pipe.runtime.environment import env_rank, env_world_size
from afm_pipe.runtime.errors import RankLostError, UserError
from afm_pipe.runtime.signals import Stopped, graceful_shutdown, stop_with_dvc

P = ParamSpec("P")
SECONDS_FIRST = 5.0  # that the rank which has most to say has for it


def user_command(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end a user's mistake with one message on stderr and exit code 1, without a stack trace.

    Asked to end by a signal, it ends with one line too, and an exit code that says so (afm_pipe/runtime/signals.py).
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with graceful_shutdown():
                stop_with_dvc()
                command(*args, **kwargs)
        except Stopped as stopped:
            end(str(stopped), stopped.code, agreed=True)
        except UserError as error:
            end(f"error: {error}", 1, lost=isinstance(error, RankLostError))

    return run


def end(message: str, code: int, agreed: bool = False, lost: bool = False) -> NoReturn:
    """Print on stderr why this process ends, once for all ranks, and end it with an exit code.

    Where all have `agreed` to end the first rank says so. Where several may have the same to say, the others wait for
    it: whoever started the ranks ends them all when one has ended. It also says what became of one that is `lost`.
    """
    if env_world_size() == 1:
        print(message, file=sys.stderr)
        raise SystemExit(code)
    if env_rank() > 0 and not agreed:
        time.sleep(SECONDS_FIRST)
    if not (agreed and env_rank() > 0 or lost and "TORCHELASTIC_RUN_ID" in os.environ):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # at once: to take an interpreter with torch apart takes seconds, in which the others would wait
