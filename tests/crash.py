"""Kill runs at random moments, resume them, and compare the results with those of an uninterrupted run, bit for bit.

    make crash-test
    python -m tests.crash --kills 50 --out docs/crash-test.json

The process imports everything once and forks for every start. What a kill left on disk tells where it fell.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch, machine_name
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.commands import user_command
from afm_pipe.training.checkpoints import checkpoints

RUN = "t4"
# EMA and D are reloaded on the way, so that a resume needs more than the newest checkpoint.
PHASES = "[{until_epoch: 5}, {until_epoch: 8, reload_ema: epoch, reload_discriminator: 2}]"
# The monitor acts, too: at update 20 it rolls back to update 10 as often as it may, at update 40 it reloads D by trial.
# So a resume needs its memory and the files it keeps.
MONITOR = {
    "policy": "act",
    "settle_epochs": 2.0,
    "probe.every_epochs": 1.25,
    "divergence.spread": 1000.0,
    "significance": 0.001,
    "stagnation": "{probes: 3, improvement: 1.0, d_accuracy: 0.0}",
    "act": "{rollbacks: 2, lr: 0.9, candidates: 2, trial_epochs: 0.3, transport_speed: 2.0}",
}
OVERRIDES = (
    f"runs.{RUN}.phases={PHASES}",
    f"runs.{RUN}.size=s4",
    *(f"runs.{RUN}.monitor.{name}={value}" for name, value in MONITOR.items()),
)
KILLS_OF_A_RUN = 5


def start(work: Callable[[], None], said: Path | None = None) -> int:
    """Run `work` as a command in a forked child process that prints to `said`; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
        output = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w")  # whoever forked may have others
        torch.set_num_threads(1)
        user_command(work)()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Return the exit code of a child, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(params: Params, checkpoint_seconds: float) -> Callable[[], None]:
    """Return a function that trains the run in the current folder."""
    return lambda: pipeline.train(params, RUN, Launch(device="cpu", checkpoint_seconds=checkpoint_seconds))


def result() -> dict[str, bytes]:
    """Return all files that a finished run in the current folder has made: nothing may depend on kills.

    Timings are left out: costs, and the clocks in the checkpoint's manifest.
    """
    (folder,) = paths.WORK.glob(f"{RUN}/*/checkpoints")
    last = checkpoints(folder)[-1]
    files = [path for path in last.iterdir() if path.name != "manifest.json"]  # optimizers, buffers, rows, events
    files += [path for path in folder.parent.glob("*") if path.is_file()]  # curves.csv, events.jsonl
    files += folder.parent.glob("adversaries/epoch-*")  # which of the probes' remain depends on the checkpoints
    for root in (paths.model(RUN), paths.WORK / "dvclive" / RUN):
        files += [path for path in root.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in [*files, paths.curves(RUN)]}


def fallen(folder: Path) -> str:
    """Say where in the writing of checkpoints a kill fell, from what it left under `folder`."""
    present = checkpoints(folder)
    for aside in folder.glob(".update-*.partial"):
        written = {path.name for path in aside.iterdir()}
        if "manifest.json" in written:
            return "before the rename"
        return "in the manifest" if "extra.json" in written else "in the parts"
    if any(not (path / "manifest.json").is_file() for path in present):
        return "while an old one was deleted"
    return "before the first one" if not present else "between two"


def crash(project: Path, params: Params, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs in copies of `project` until there were `kills`; return what was found."""
    before = Path.cwd()
    fell: Counter[str] = Counter()
    identical = runs = 0
    try:
        with tempfile.TemporaryDirectory() as name:
            alone = Path(name) / "alone"
            shutil.copytree(project, alone)
            os.chdir(alone)
            began = time.monotonic()
            assert wait(start(train(params, 0.1))) == 0
            duration, expected = time.monotonic() - began, result()
            while fell.total() < kills:
                os.chdir(name)
                shutil.rmtree("killed", ignore_errors=True)
                shutil.copytree(project, "killed")
                os.chdir("killed")
                own = kill_some(params, min(KILLS_OF_A_RUN, kills - fell.total()), duration, rng)
                assert wait(start(train(params, 0.1))) == 0, "what a kill left is not resumed"
                fell += own
                identical += own.total() * (result() == expected)
                runs += own.total() > 0
    finally:
        os.chdir(before)
    return {
        "kills": fell.total(),
        "identical": identical,
        "runs": runs,
        "fell": dict(sorted(fell.items())),
        "compared": sorted({Path(name).name for name in expected if "plots" not in name}),
        "updates": params.runs[RUN].phases[-1].until_epoch * 60 / params.runs[RUN].batch_size,
    }


def kill_some(params: Params, kills: int, duration: float, rng: random.Random) -> Counter[str]:
    """Start the run in the current folder `kills` times and kill it, at a random moment each."""
    fell: Counter[str] = Counter()
    for _ in range(kills):
        child = start(train(params, rng.choice([0.0, 0.0, 0.1, 0.3])))
        time.sleep(rng.uniform(0.05, 0.6) * duration)
        os.kill(child, signal.SIGKILL)
        if wait(child) != -signal.SIGKILL:
            break  # it had finished
        folders = list(paths.WORK.glob(f"{RUN}/*/checkpoints"))
        fell[fallen(folders[0]) if folders else "before the first one"] += 1
    return fell


def main() -> None:
    """Run the test and write its result; exit with 1 unless all are identical."""
    from tests.conftest import make_discs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=Path("docs/crash-test.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        make_discs(Path(name) / "project")
        params = load_params(Path(name) / "project" / "params.yaml", OVERRIDES)
        found = crash(Path(name) / "project", params, options.kills, random.Random(options.seed))
    found |= {
        "seed": options.seed,
        "machine": machine_name(torch.device("cpu")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "system": platform.release()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(
        f"{found['identical']} of {found['kills']} kills resumed to identical bits; {options.out} says where they fell"
    )
    raise SystemExit(found["identical"] != found["kills"])


if __name__ == "__main__":
    main()
