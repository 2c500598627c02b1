"""How the machine is used, which never changes a number's meaning and so never stands in params.yaml.

A setting comes from a flag of a command where it has one, else from the environment (AFM_ and its name in capitals:
AFM_DEVICE, AFM_NPROC_PER_NODE, ...), else from the key of its name in an untracked launch.toml, else from the defaults
here.
"""

import os
import platform
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from afm_pipe.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

LAUNCH_FILE = Path("launch.toml")


class Launch(BaseModel):
    """Settings of the machine, not of the study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "auto"
    """A torch device such as cpu, cuda or cuda:1; auto: cuda where there is one."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """A killed training loses at most about this much."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """So many of each training stay on disk, beside the one that is being written; an older one serves where the newest
    is damaged."""
    keep_every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Of each run stay on disk, too, the first checkpoint after each so many epochs; left out: none."""
    keep_best: bool = False
    """And the first checkpoint at or after the watch's best probe so far."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes, with one thread each, that train trials of tables; left out: one per core, or one on a GPU."""
    checkpoint_activations: bool = False
    """Of G and D keep only what goes into each block, and compute the inside again: more time, less memory."""
    compile: bool = False
    """torch.compile the blocks of G and D: for GPUs; on a CPU it takes a minute and gains little."""
    tf32: bool = True
    """On NVIDIA GPUs, let float32 matrix products round their inputs to TF32, as the paper does."""
    ema_on_cpu: bool = False
    """Keep G's moving average in the machine's memory instead of the GPU's."""
    shard: bool = False
    """Of G, D, their optimizers and moving average keep on each rank its share alone: for what fits no single card."""

    nproc_per_node: Annotated[int, Field(ge=1)] | None = None
    """Processes to start on this machine, each of which computes its share of every batch; left out: one."""
    nnodes: Annotated[int, Field(ge=1)] = 1
    """Machines that work together; the command is started on each."""
    rendezvous: str | None = None
    """HOST:PORT at which the machines meet, where there are several: any free port of any one of them."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """So often all ranks are started anew after one has failed, from the newest checkpoint."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Images of a batch that a device takes at once; less takes less memory; left out: the rank's whole share."""

    @property
    def ranks(self) -> int:
        """How many there are on all machines."""
        return (self.nproc_per_node or 1) * self.nnodes

    @model_validator(mode="after")
    def _check(self) -> "Launch":
        if self.nnodes > 1 and self.rendezvous is None:
            raise ValueError(f"expected rendezvous, HOST:PORT, for {self.nnodes} machines to meet at")
        for other in ("compile", "ema_on_cpu"):
            if self.shard and getattr(self, other):
                raise ValueError(f"expected shard or {other}, not both: what is sharded is neither compiled nor moved")
        return self

    def num_workers(self, device: "torch.device") -> int:
        """Return the number of processes that train trials."""
        return self.workers or (1 if device.type == "cuda" else os.cpu_count() or 1)

    def torch_device(self) -> "torch.device":
        """Return the device. Raises UserError when this machine does not have it."""
        import torch

        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"  # each rank has its own
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Found the device {name!r}, which is not usable here ({reason}): set AFM_DEVICE."
            ) from None
        return device


def load_launch(**flags: Any) -> Launch:
    """Return the launch settings; `flags` that are not None come first.

    Raises UserError naming the setting that is wrong and where it stands.
    """
    settings: dict[str, Any] = {}
    if LAUNCH_FILE.exists():
        try:
            settings = tomllib.loads(LAUNCH_FILE.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"Found {LAUNCH_FILE}, which is not TOML: {error}.") from None
    for name in Launch.model_fields:
        variable = f"AFM_{name.upper()}"
        if variable in os.environ:
            settings[name] = os.environ[variable]
    settings |= {name: value for name, value in flags.items() if value is not None}
    try:
        return Launch.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        found = f" {'.'.join(map(str, problem['loc']))} = {problem['input']!r}" if problem["loc"] else "s"
        name = str(problem["loc"][0]) if problem["loc"] else ""
        flag = f"--{name.replace('_', '-')}" if flags.get(name) is not None else ""
        where = f"in {flag}" if flag else f"in the environment (AFM_*) or in {LAUNCH_FILE}"
        raise UserError(
            f"Found launch setting{found}: {problem['msg'].removeprefix('Value error, ')}. Mend it {where}."
        ) from None


def machine_name(device: "torch.device") -> str:
    """Return what computes: the GPU's name, or the processor's and its number of cores."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without a name there
    return f"{name}, {os.cpu_count()} cores"
