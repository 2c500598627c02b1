"""A file or folder is written whole or not at all, at whatever moment its process ends."""

import errno
import multiprocessing
import os
import signal
import stat
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from afm_pipe.runtime.files import atomic_path, remove_leftovers
from afm_pipe.runtime.signals import Stopped

MODEL = Path("model")
NAMES = ("a", "b", "c")


def write(text: str) -> None:
    with atomic_path(MODEL) as temp:
        temp.mkdir()
        for name in NAMES:
            (temp / name).write_text(text)


def content() -> set[str]:
    assert sorted(path.name for path in MODEL.iterdir()) == sorted(NAMES)
    return {(MODEL / name).read_text() for name in NAMES}


def interrupt(number: int, kill: bool) -> None:
    """Replace the folder; before its `number`-th change of the file system, be killed or receive a signal."""
    left = number

    def hook(event: str, _: Any) -> None:
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left == 0 and kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if left == 0:
                raise Stopped(signal.SIGTERM)

    sys.addaudithook(hook)
    try:
        write("new")
    except Stopped:
        os._exit(1)
    os._exit(0 if left > 0 else 2)


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("next_step", ["nothing", "leftovers", "write"])
def test_a_folder_that_is_replaced_is_the_old_or_the_new_one_whenever_it_ends(
    project: Path, kill: bool, next_step: str
) -> None:
    found = []
    for number in count(1):
        write("old")
        process = multiprocessing.get_context("fork").Process(target=interrupt, args=(number, kill))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == (-signal.SIGKILL if kill else 1)
        if next_step == "leftovers":
            remove_leftovers(project)
            assert [path.name for path in project.iterdir()] == [MODEL.name]
        elif next_step == "write" or kill:  # a killed process cannot put anything back itself
            with pytest.raises(Stopped), atomic_path(MODEL):
                raise Stopped(signal.SIGTERM)
        found.append(content())
    assert {"old"} in found and {"new"} in found and all(len(texts) == 1 for texts in found)


def test_a_file_system_that_does_not_sync_folders_is_no_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = errno.EINVAL
    fsync = os.fsync

    def of_files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    write("new")
    assert content() == {"new"}
    code = errno.EIO
    with pytest.raises(OSError, match=os.strerror(code)):
        write("newer")
