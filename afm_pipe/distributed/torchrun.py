"""Run a command on several processes through torch.distributed.run.

`afm-pipe train xl2 --nproc-per-node 8`, AFM_NPROC_PER_NODE=8 and `nproc_per_node = 8` in launch.toml do what
`torchrun --nproc-per-node 8 -m afm_pipe train xl2` does. In addition, they print one message per failure instead of
one per process, return meaningful exit codes, and forward a scheduler's signals to the processes.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.runtime.environment import under_launcher
from afm_pipe.runtime.signals import EXIT_INTERRUPTED, EXIT_RETRY, stop_with_parent

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

SECONDS_TO_CHECKPOINT = 600


def launch_processes(launch: Launch) -> Launch:
    """Start the processes that `launch` specifies and exit with their code; in each of them, return `launch`.

    Each process runs the same command line, and so calls this function too.
    """
    if under_launcher():
        stop_with_parent()  # a launcher that is gone cannot end its processes
        return launch
    if launch.world_size == 1:
        return launch
    script = Path(sys.argv[0])
    is_stage = script.suffix == ".py" and script.name != "__main__.py"
    command = sys.argv if is_stage else ["-m", "afm_pipe", *sys.argv[1:]]
    raise SystemExit(run_processes(launch, command))


def run_processes(launch: Launch, command: list[str]) -> int:
    """Run `python COMMAND` on `launch.nproc_per_node` processes of this machine; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores are many times slower
    import logging

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        """Forward only the first signal, as SIGTERM: processes on a terminal receive Ctrl-C directly, and a second
        signal would stop them immediately."""
        received.append(number)
        if len(received) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    logging.disable(logging.CRITICAL)  # failures and signals are reported below or by the processes
    handlers = {number: signal.signal(number, forward) for number in (signal.SIGUSR1, signal.SIGINT)}
    try:
        torchrun.run(torchrun.parse_args([*_options(launch), sys.executable, *command]))
    except ChildFailedError as error:
        rank, failure = _cause(error)
        if failure.exitcode > 0:
            return failure.exitcode  # the process has printed why
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: Found rank {rank} killed by {name} (SIGKILL may mean out of memory), expected it to finish; all "
            "processes were stopped. To resume from the newest checkpoint, run the same command again.",
            file=sys.stderr,
        )
        return 1
    except SignalException:
        return EXIT_INTERRUPTED if signal.SIGINT in received else EXIT_RETRY
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _cause(error: "ChildFailedError") -> tuple[int, "ProcessFailure"]:
    """Return the rank that failed first, and its failure.

    Timestamps alone do not tell: after a kill, other processes may fail before torchrun notices, and torchrun ends the
    rest with SIGTERM. So a kill counts before an exit code, and an exit code before SIGTERM.
    """

    def order(rank: int) -> tuple[int, int]:
        code = error.failures[rank].exitcode
        return 2 if code == -signal.SIGTERM else 1 if code > 0 else 0, error.failures[rank].timestamp

    rank = min(error.failures, key=order)
    return rank, error.failures[rank]


def _options(launch: Launch) -> list[str]:
    """Return the options of torchrun."""
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
    if "--shutdown-timeout" in known:  # older versions wait 30 s
        chosen["--shutdown-timeout"] = str(SECONDS_TO_CHECKPOINT)
    if "--signals-to-handle" in known:
        chosen["--signals-to-handle"] = "SIGTERM,SIGHUP,SIGQUIT"
    return [part for name, value in chosen.items() for part in ([name] if value is None else [name, value])]
