"""SLURM batch scripts: one command on all GPUs of a job's machines, or an array of trials. Both requeue themselves."""

import shlex
from collections.abc import Sequence

SIGNAL_SECONDS = 300  # before the time limit, when processes are told to write a checkpoint
PORT = 29500
HEAD = """#!/bin/bash
#SBATCH --job-name={name}
{resources}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{seconds}   # seconds before the time limit; the processes then write a checkpoint

"""
ALL_GPUS = """export AFM_NPROC_PER_NODE={gpus} AFM_NNODES=$SLURM_NNODES
export AFM_RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{port}
job=$SLURM_JOB_ID

# Each machine's afm-pipe starts its processes through torch.distributed.run and forwards the signal to them.
"""
ONE_TRIAL = """export AFM_WORKERS=1 OMP_NUM_THREADS=1
job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID   # the identifier of one task may be that of the array

# A trial belongs to the process that holds its lease; `afm-pipe tables` collects the results.
trials=({trials})
"""
TAIL = """srun {command} &
step=$!
trap 'kill -USR1 $step' USR1 TERM   # srun forwards it to every machine
wait $step; code=$?
while kill -0 $step 2>/dev/null; do wait $step; done   # a signal ends a wait, not the step
if [ $code -gt 128 ]; then wait $step; code=$?; fi

# 75: stopped by a signal with a checkpoint written. Over 128: killed, by lack of memory if it happens again and again.
if [ $code -eq 75 ] || {{ [ $code -gt 128 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 5 ]; }}; then
  scontrol requeue "$job"
fi
exit $code
"""


def batch_script(command: Sequence[str], nodes: int, gpus: int, time: str) -> str:
    """Return a script that runs `afm-pipe COMMAND` on `gpus` processes of each of `nodes` machines."""
    resources = f"#SBATCH --nodes={nodes}\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node={gpus}"
    middle = ALL_GPUS.format(gpus=gpus, port=PORT)
    return _head(command, resources, time) + middle + TAIL.format(command=shlex.join(["afm-pipe", *command]))


def array_script(command: Sequence[str], trials: Sequence[str], gpus: int, time: str, at_once: int) -> str:
    """Return a script whose array tasks each run `afm-pipe COMMAND --trial TRIAL` on `gpus` GPUs or on one core."""
    resources = f"#SBATCH --array=0-{len(trials) - 1}%{at_once}\n#SBATCH --ntasks=1\n#SBATCH --cpus-per-task=1"
    resources += f"\n#SBATCH --gpus-per-task={gpus}" * (gpus > 0)
    middle = ONE_TRIAL.format(trials=" ".join(trials))
    words = shlex.join(["afm-pipe", *command]) + ' --trial "${trials[$SLURM_ARRAY_TASK_ID]}"'
    return _head(command, resources, time) + middle + TAIL.format(command=words)


def _head(command: Sequence[str], resources: str, time: str) -> str:
    name = "-".join(["afm", *(word for word in command if not word.startswith("-"))])[:60]
    return HEAD.format(name=shlex.quote(name), resources=resources, time=shlex.quote(time), seconds=SIGNAL_SECONDS)
