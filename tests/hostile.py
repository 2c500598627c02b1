"""Means to show that a loader refuses what is made to do harm, in little memory and time, and runs nothing."""

import os
import resource
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import write_json

CPU = torch.device("cpu")
MORE_MEMORY, CPU_SECONDS = 400 << 20, 20  # what a refusal may take
TERABYTE = 1 << 40


def refused(load: Callable[[], Any], words: str) -> None:
    """Assert that a child process with little memory and time to spare gets a UserError that matches `words`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MORE_MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            with pytest.raises(UserError, match=words):
                load()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, words


class Bomb:
    """What a hostile pickle does: it runs something when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def repacked(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive anew, its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def model_folder(weights: dict[str, Tensor], **changes: Any) -> Path:
    folder = Path("models/x")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "generator.safetensors")
    save_file(weights, folder / "classifier.safetensors")
    shape = {"size": "t4", "channels": 4, "latent_size": 8, "num_classes": 10}
    write_json(folder / "config.json", {"model": shape | changes, **(shape | changes)})
    return folder
