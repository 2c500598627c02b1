"""Environment variables by which a launcher such as torchrun tells a process its place in a group."""

import os
import sys
from functools import cache

from afm_pipe.runtime.errors import UserError

ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
VARIABLES = ("RANK", "WORLD_SIZE", *ADDRESS)


def under_launcher() -> bool:
    """Return whether a launcher started this process as one of a group.

    Clusters leave some of these variables in every process. A group of one that torchrun did not make is ignored, and
    one line says so. Raises UserError for a group of several that is incomplete or inconsistent.
    """
    found = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not {"RANK", "WORLD_SIZE"} & set(found):
        return False
    shown = " ".join(f"{name}={value[:60]}" for name, value in found.items())
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not by_torchrun and found.get("RANK", "0") == "0" and found.get("WORLD_SIZE", "1") == "1":
        _say(f"Ignored {shown} in the environment: a group of one process.")
        return False
    missing = [name for name in VARIABLES if name not in found]
    if _place() is None:
        problem = f"without {', '.join(missing)}" if missing else "which do not fit together"
        raise UserError(
            f"Found {shown} in the environment, {problem}, expected {', '.join(VARIABLES)} as torchrun sets them: "
            "unset them, and start several processes with --nproc-per-node or torchrun."
        )
    if not by_torchrun and env_rank() == 0:
        _say(f"Obeyed {shown} in the environment.")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch prints stack frames while it waits
    return True


@cache
def _say(line: str) -> None:
    """Print a line once."""
    print(line, file=sys.stderr)


def env_rank() -> int:
    """Return the rank of this process, before the process group is initialized."""
    place = _place()
    return place[0] if place else 0


def env_world_size() -> int:
    """Return the number of processes."""
    place = _place()
    return place[1] if place else 1


def local_world_size() -> int:
    """Return the number of processes of the group on this machine."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(value), 1) if env_world_size() > 1 and value.isdecimal() else 1


def _place() -> tuple[int, int] | None:
    """Return rank and world size, None where the group is incomplete or inconsistent."""
    rank, size, address, port = (os.environ.get(name, "") for name in VARIABLES)
    if not (address and rank.isdecimal() and size.isdecimal() and port.isdecimal()):
        return None
    return (int(rank), int(size)) if int(rank) < int(size) and 0 < int(port) < 1 << 16 else None
