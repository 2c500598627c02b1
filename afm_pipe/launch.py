"""How the machine is used, which never changes a number's meaning and so never stands in params.yaml.

A setting comes from the environment (AFM_ and its name in capitals: AFM_DEVICE, AFM_WORKERS, ...), else from the key of
its name in an untracked launch.toml, else from the defaults here.
"""

import os
import platform
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from afm_pipe.errors import UserError

if TYPE_CHECKING:
    import torch

    from afm_pipe.training.engine import Engine

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
    workers: Annotated[int, Field(ge=1)] | None = None
    """Processes, of one thread each, that train the cells of tables; left out: one for each core, one on a GPU."""
    checkpoint_activations: bool = False
    """Of G and D keep only what goes into each block, and compute the inside again: a fifth more time, for memory."""
    compile: bool = False
    """torch.compile the blocks of G and D: for GPUs; on a CPU it takes a minute and gains little."""
    tf32: bool = True
    """On NVIDIA GPUs, let float32 matrix products round their inputs to TF32, as the paper does."""
    ema_on_cpu: bool = False
    """Keep G's moving average in the machine's memory instead of the GPU's."""

    def engine(self) -> "Engine":
        """Return how trainings compute."""
        from afm_pipe.training.engine import Engine

        return Engine(self.checkpoint_activations, self.compile, self.tf32, self.ema_on_cpu)

    def num_workers(self, device: "torch.device") -> int:
        """Return how many processes train cells."""
        return self.workers or (1 if device.type == "cuda" else os.cpu_count() or 1)

    def torch_device(self) -> "torch.device":
        """Return the device. Raises UserError when this machine does not have it."""
        import torch

        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Found the device {name!r}, which is not usable here ({reason}): set AFM_DEVICE."
            ) from None
        return device


def load_launch() -> Launch:
    """Return the launch settings. Raises UserError naming the setting that is wrong and where it stands."""
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
    try:
        return Launch.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"Found launch setting {'.'.join(map(str, problem['loc']))} = {problem['input']!r}: {problem['msg']}. "
            f"Mend it in the environment (AFM_*) or in {LAUNCH_FILE}."
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
