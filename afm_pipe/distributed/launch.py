"""Launch settings: how a run uses this machine. They affect speed and memory, not the run, so params.yaml has none.

In order of precedence: a flag of the command, an environment variable (AFM_DEVICE, AFM_NPROC_PER_NODE, ...), a key of
the untracked launch.toml, the default.
"""

import os
import platform
import re
import tomllib
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from afm_pipe.runtime import paths
from afm_pipe.runtime.environment import env_world_size
from afm_pipe.runtime.errors import UserError, describe_mistake
from afm_pipe.runtime.machine import usable_cores

if TYPE_CHECKING:
    import torch

LAUNCH_FILE = Path("launch.toml")


class Launch(BaseSettings):
    """Launch settings; the constructor's arguments are the command's flags."""

    model_config = SettingsConfigDict(env_prefix="AFM_", extra="forbid", frozen=True)

    device: str = "auto"
    """A torch device such as cpu, cuda or cuda:1; auto: cuda if available."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] | None = None
    """Seconds between checkpoints: the most that a killed run loses. None: 60, or more if they cost 1 % of the time."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Number of checkpoints to keep per run; an older one is used if the newest is damaged."""
    keep_every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Also keep the first checkpoint after every N epochs; None: keep none of these."""
    keep_best: bool = False
    """Also keep the first checkpoint at or after the best probe of the monitor."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Number of one-thread processes that train runs and trials; None: one per usable core, or one on a GPU."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of each process on a CPU; None: OMP_NUM_THREADS, else one for small networks and images, which more
    threads hardly speed up and a busy neighbor then slows down many times, and all usable cores for others."""
    checkpoint_activations: bool = False
    """Recompute the activations in the blocks of G and D in the backward pass: slower, but less memory."""
    compile: bool = False
    """Compile the blocks of G and D with torch.compile; for GPUs, since on a CPU it takes a minute and gains little."""
    capture: bool = False
    """Capture updates as CUDA graphs, for small models on one NVIDIA GPU, whose kernels end sooner than the host can
    start them. Numbers change by rounding: the learning rate is then one of float32."""
    tf32: bool = True
    """On NVIDIA GPUs, round the inputs of float32 matrix products to TF32, as the paper does."""
    ema_on_cpu: bool = False
    """Keep the EMA weights of G in host memory instead of on the device."""
    shard: bool = False
    """Shard G, D, their optimizers and the EMA weights over the processes (FSDP2), for models too large for one GPU."""

    force: Annotated[str, Field(pattern=r"^(([a-z-]+@[a-z0-9_-]+|classifier|toy)(,|$))*$")] = ""
    """Stages that do their work again although their result is current, separated by commas: train@t4,evaluate@t4."""
    tensorboard: bool = False
    """Also log the curves of runs to TensorBoard, under work/tensorboard/RUN."""
    wandb: bool = False
    """Also log the curves of runs to Weights & Biases, as its own variables (WANDB_MODE, WANDB_PROJECT, ...) say."""

    nproc_per_node: Annotated[int, Field(ge=1)] | None = None
    """Number of processes to start on this machine; each computes its shard of every batch. None: one."""
    nnodes: Annotated[int, Field(ge=1)] = 1
    """Number of machines; start the command on each."""
    rendezvous: str | None = None
    """HOST:PORT of the rendezvous of several machines: any free port of one of them."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How many times to restart all processes from the newest checkpoint after one fails."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Images per forward pass; fewer take less memory. None: the whole shard of the process."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        *unused: PydanticBaseSettingsSource,
        **no_dotenv_nor_secrets: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read flags, the environment and launch.toml, in this order."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, paths.local(LAUNCH_FILE))

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return (self.nproc_per_node or 1) * self.nnodes

    @model_validator(mode="after")
    def _check(self) -> "Launch":
        if self.nnodes > 1 and self.rendezvous is None:
            raise ValueError(f"expected rendezvous (HOST:PORT) with nnodes {self.nnodes}, found none")
        for other in ("compile", "ema_on_cpu"):
            if self.shard and getattr(self, other):
                raise ValueError(
                    f"expected either shard or {other}, found both: sharded weights are neither compiled nor moved"
                )
        for other in ("shard", "ema_on_cpu"):
            if self.capture and getattr(self, other):
                raise ValueError(f"expected either capture or {other}, found both: a graph stays on one GPU")
        if self.capture and self.world_size > 1:
            raise ValueError(f"expected one process with capture, found {self.world_size}: a graph stays on one GPU")
        return self

    def forces(self, stage: str, name: str) -> bool:
        """Return whether a stage of a run or table is forced, by the name that it has in dvc.yaml."""
        wanted = f"{stage}@{name}" if name else stage
        stages = re.sub(r"-(guided|imported)@", "@", self.force.replace("guide@", "train@")).split(",")
        return wanted in stages

    def num_workers(self) -> int:
        """Return the number of worker processes that train runs and trials."""
        return self.workers or (1 if self.torch_device().type == "cuda" else usable_cores())

    def use_threads(self, small: bool) -> None:
        """Set the number of threads of this process for a small or large network; a worker of a pool keeps its one."""
        import torch

        if parent_process() is None and (self.threads or "OMP_NUM_THREADS" not in os.environ):
            torch.set_num_threads(self.threads or (1 if small else usable_cores()))

    def torch_device(self) -> "torch.device":
        """Return the device. Raises UserError if it is not usable on this machine."""
        import torch

        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if name == "cuda" and env_world_size() > 1 and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU per process
        try:
            device = torch.device(name)
            if device.index is not None and device.type == "cuda":
                torch.cuda.set_device(device)  # before anything else touches a GPU: this process uses no other
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Found the device {name!r}, which is not usable here ({reason}): set AFM_DEVICE."
            ) from None
        return device


def load_launch(**flags: Any) -> Launch:
    """Return the launch settings. A flag with value None counts as not given.

    Raises UserError naming the wrong setting and where to fix it.
    """
    flags = {name: value for name, value in flags.items() if value is not None}
    if (path := paths.local(LAUNCH_FILE)).is_dir():
        raise UserError(f"Found {path}, which is a folder, expected a file of launch settings or nothing: rename it.")
    try:
        return Launch(**flags)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"Found {LAUNCH_FILE}, which is not TOML: {error}.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        message = describe_mistake(problem)
        if not problem["loc"]:
            raise UserError(f"Found launch settings: {message}. Fix AFM_* or {LAUNCH_FILE}.") from None
        name = str(problem["loc"][0])
        variable, where = f"AFM_{name.upper()}", str(LAUNCH_FILE)
        if name in flags:
            where = f"--{name.replace('_', '-')}"
        elif variable in os.environ:
            where = f"the environment variable {variable}"
        found, _, expected = message.removeprefix("found ").partition(", ")
        raise UserError(f"Found launch setting {name} = {found}: {expected}. Fix {where}.") from None


def machine_name(device: "torch.device") -> str:
    """Return the name of the GPU, or of the processor and its number of cores."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or the file has no model name
    return f"{name}, {os.cpu_count()} cores"
