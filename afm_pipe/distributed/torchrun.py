"""Start the same command once per rank, through torch.distributed.run, when launch settings ask for several.

`afm-pipe train xl2 --nproc-per-node 8`, AFM_NPROC_PER_NODE=8 or `nproc_per_node = 8` in launch.toml all do what
`torchrun --nproc-per-node 8 -m afm_pipe train xl2` does, and besides: one message where a rank fails instead of one per
rank and a table, exit codes that mean something, and signals of a scheduler passed on to the ranks.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.runtime.environment import under_launcher
from afm_pipe.runtime.signals import INTERRUPTED, TRY_AGAIN, stop_with_parent

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

SECONDS_TO_CHECKPOINT = 600


def launch_processes(launch: Launch) -> Launch:
    """Return the settings in a process that is to work; where several are to, start them and exit with their code.

    The ranks run the command line of this process again. Each comes here too and goes on.
    """
    if under_launcher():
        stop_with_parent()  # which can no longer end the ranks when it is gone
        return launch
    if launch.world_size == 1:
        return launch
    raise SystemExit(run_processes(launch, own_command()))


def own_command() -> list[str]:
    """Return this process's command line as arguments of the interpreter."""
    script = Path(sys.argv[0])
    if script.suffix == ".py" and script.name != "__main__.py":
        return sys.argv
    return ["-m", "afm_pipe", *sys.argv[1:]]


def run_processes(launch: Launch, command: list[str]) -> int:
    """Run `command` on `launch.nproc_per_node` ranks here, of `launch.nnodes` machines; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads each on as many cores: many times slower
    import logging

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # what torchrun logs of failures and signals is said below, or by the ranks
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        """Pass a signal on as TERM: USR1, by which schedulers announce the end, means the same, and of Ctrl-C the ranks
        of a terminal hear by themselves, for whom a second one would mean at once."""
        asked.append(number)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGUSR1, ask)
    signal.signal(signal.SIGINT, ask)
    try:
        torchrun.run(torchrun.parse_args([*options(launch), sys.executable, *command]))
    except ChildFailedError as error:
        rank, failure = _cause(error)
        if failure.exitcode > 0:
            return failure.exitcode  # the rank has said why
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: Found rank {rank} ended by {name}, expected it to finish (SIGKILL may mean that memory ran out); "
            "the other ranks were ended. The same command goes on from the newest checkpoint.",
            file=sys.stderr,
        )
        return 1
    except SignalException:
        return INTERRUPTED if signal.SIGINT in asked else TRY_AGAIN
    return 0


def _cause(error: "ChildFailedError") -> tuple[int, "ProcessFailure"]:
    """Return the rank that the others' ends follow from.

    Of one that is killed they may hear, and end, before torchrun does; torchrun itself ends ranks by SIGTERM.
    """

    def place(rank: int) -> tuple[int, int]:
        code = error.failures[rank].exitcode
        return 2 if code == -signal.SIGTERM else 1 if code > 0 else 0, error.failures[rank].timestamp

    rank = min(error.failures, key=place)
    return rank, error.failures[rank]


def options(launch: Launch) -> list[str]:
    """Return the options of torchrun that launch settings ask for."""
    from torch.distributed import run as torchrun

    chosen = {
        "--no-python": None,
        "--nproc-per-node": str(launch.nproc_per_node or 1),
        "--nnodes": str(launch.nnodes),
        "--max-restarts": str(launch.max_restarts),
    }
    if launch.nnodes == 1:
        chosen["--standalone"] = None
    else:
        chosen |= {
            "--rdzv-backend": "c10d",
            "--rdzv-endpoint": launch.rendezvous or "",
            "--rdzv-id": os.environ.get("SLURM_JOB_ID", "afm-pipe"),
        }
    known = torchrun.get_args_parser().format_help()
    if "--shutdown-timeout" in known:  # older ones wait 30 s
        chosen["--shutdown-timeout"] = str(SECONDS_TO_CHECKPOINT)
    if "--signals-to-handle" in known:
        chosen["--signals-to-handle"] = "SIGTERM,SIGHUP,SIGQUIT"
    return [part for name, value in chosen.items() for part in ([name] if value is None else [name, value])]
