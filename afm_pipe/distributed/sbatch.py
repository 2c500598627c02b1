"""A SLURM batch script that runs one command on all GPUs of the job's machines and is requeued when preempted."""

import shlex
from collections.abc import Sequence

SIGNAL_SECONDS = 300  # before the time limit, when processes are told to write a checkpoint
PORT = 29500
SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{seconds}   # seconds before the time limit; the processes then write a checkpoint

export AFM_NPROC_PER_NODE={gpus} AFM_NNODES=$SLURM_NNODES
export AFM_RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{port}

# Each machine's afm-pipe starts its processes through torch.distributed.run and forwards the signal to them.
srun {command} &
step=$!
trap 'kill -USR1 $step' USR1 TERM   # srun forwards it to every machine
wait $step; code=$?
while kill -0 $step 2>/dev/null; do wait $step; done   # a signal ends a wait, not the step
if [ $code -gt 128 ]; then wait $step; code=$?; fi

# 75: stopped by a signal with a checkpoint written.
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""


def batch_script(command: Sequence[str], nodes: int, gpus: int, time: str) -> str:
    """Return a script that runs `afm-pipe COMMAND` on `gpus` processes of each of `nodes` machines."""
    name = "-".join(["afm", *(word for word in command if not word.startswith("-"))])[:60]
    return SCRIPT.format(
        name=shlex.quote(name),
        nodes=nodes,
        gpus=gpus,
        time=shlex.quote(time),
        seconds=SIGNAL_SECONDS,
        port=PORT,
        command=shlex.join(["afm-pipe", *command]),
    )
