"""Checkpoints: saved whole or not at all, checked before use, written behind the training's back.

A checkpoint is a folder update-NNNNNNNNN with one safetensors file per part of the state, curves.csv, extra.json, and a
manifest.json that lists their sizes and hashes. The latest is the highest whose files are what its manifest says. Where
a state is sharded over ranks, shards/ holds a file of each rank's instead of the parts; either is read by any engine.
"""

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
from torch import Tensor

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import load_tensors, save_tensors
from afm_pipe.runtime.errors import UnwritableError, UserError
from afm_pipe.runtime.files import atomic_path, read_json, remove_leftovers, sha256_file, write_json
from afm_pipe.training.curves import Row, read_curves, write_curves
from afm_pipe.training.sharding import names_in, read_shards, write_shards

BESIDES = ("curves.csv", "extra.json")  # the parts of tensors
SHARDS = "shards"


class RetentionPolicy(NamedTuple):
    """How checkpoints are written and kept, which never changes a number."""

    last: int = 2  # the latest, and one in case the latest is damaged
    in_background: bool = True  # where there is memory for a copy of the state
    own: Callable[[], None] = lambda: None
    """Called before a checkpoint counts; raises UserError where the training is no longer this process's."""
    every: int | None = None
    """Beside the latest stay the first at or after each multiple of so many updates, while the disk has room."""
    best: bool = False
    """And the first at or after the watch's best probe."""


class Saveable(Protocol):
    """What a checkpoint holds: tensors by part and name, rows of curves, a clock, and what else there is, as JSON."""

    update: int
    seconds: dict[str, float]
    rows: list[Row]
    extra: dict[str, Any]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors of the state by part and name."""


class Resumable(Saveable, Protocol):
    """What takes a checkpoint's content over."""

    def load_tensors(self, tensors: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """Take over tensors as `tensors` returns them. Raises UserError when they are of another model."""

    def targets(self, names: Iterable[tuple[str, str]]) -> dict[str, dict[str, Tensor]]:
        """Return tensors that others of these parts and names can be read into, to be taken over by `load_tensors`."""


@dataclass
class Snapshot:
    """A copy of a state in the machine's memory, which the training no longer changes."""

    update: int
    seconds: dict[str, float]
    rows: list[Row]
    extra: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, state: Saveable) -> "Snapshot":
        """Copy a state."""
        parts = {
            part: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for part, tensors in state.tensors().items()
        }
        return cls(state.update, dict(state.seconds), list(state.rows), dict(state.extra), parts)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors of the state by part and name."""
        return self.parts


class _CancelledError(Exception):
    """A checkpoint that is no longer wanted."""


class Writer:
    """Writes the checkpoints of one training, now and then in a thread of its own, the last one in front.

    A disk that is full does not end a training that could go on: the checkpoint is given up, which `notes` says once,
    and the next is tried when it is due. Only the last one must succeed. One that is not `active` writes nothing: of
    several processes with one state, one writes. Where a state is sharded over `shares`, all write, and must save and
    finish at the same moments; then it is always in front.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        seconds: float,
        keeping: RetentionPolicy,
        active: bool = True,
        shares: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.folder, self.fingerprint, self.seconds, self.keeping = folder, fingerprint, seconds, keeping
        self.active, self.shares = active, shares
        self.notes: list[str] = []
        self.trouble = ""  # in a few words, as long as there is any
        self._saved, self._update = time.monotonic(), -1
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cancelled = False

    def __enter__(self) -> "Writer":
        if self.active and self.shares.is_main_process:
            remove_leftovers(self.folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for what is being written; where all is to end at once, break it off: the checkpoints before stay."""
        self._cancelled = kind is not None and not issubclass(kind, Exception)
        if self._thread is not None:
            self._thread.join()

    def due(self) -> bool:
        """Tell whether it is time for a checkpoint, and none is on its way. Raises what the last one met."""
        waiting = self._thread is not None and self._thread.is_alive()
        if not self.active or waiting or time.monotonic() - self._saved < self.seconds:
            return False
        self._collect()
        return True

    def save(self, state: Saveable) -> None:
        """Write a checkpoint of `state` as it is now, in the background where there is memory for a copy of it."""
        self._collect()
        if not self.active:
            return
        in_background = self.keeping.in_background and self.shares.world_size == 1
        if in_background and _bytes(state) < 0.8 * psutil.virtual_memory().available:
            self._thread = threading.Thread(target=self._write, args=(Snapshot.of(state),), daemon=True)
            self._thread.start()
        else:
            self._write(state)
            self._collect()
        self._saved = time.monotonic()

    def finish(self, state: Saveable) -> None:
        """Write a checkpoint of `state` unless there is one, and return when it is safe. Raises UserError otherwise."""
        self._collect()
        if self.active and self._update != state.update:
            self._write(state, last=True)
            self._collect()

    def _write(self, state: Saveable, last: bool = False) -> None:
        try:
            stay = self._staying(state)
            save_checkpoint(self.folder, state, self.fingerprint, self.keeping.last, self._check, stay, self.shares)
            self._update, self.trouble = state.update, ""
        except _CancelledError:
            pass
        except UnwritableError as error:
            self.trouble = "disk full: no checkpoint"
            if last:
                self._error = error
            elif not self.notes:
                self.notes.append(f"update {state.update}: no checkpoint, the training goes on. {error}")
        except Exception as error:  # raised where the training looks, `_collect`
            self._error = error

    def _staying(self, state: Saveable) -> set[int]:
        probes = state.extra.get("monitor", {}).get("probes", ()) if self.keeping.best else ()
        best = min(probes, key=lambda probe: probe["kid"], default=None)
        present = [int(path.name.removeprefix("update-")) for path in checkpoints(self.folder)]
        return retained([*present, state.update], self.keeping.every, best["update"] if best else None)

    def _check(self) -> None:
        if self._cancelled:
            raise _CancelledError
        self.keeping.own()

    def _collect(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def save_checkpoint(
    folder: Path,
    state: Saveable,
    fingerprint: str,
    last: int = 2,
    check: Callable[[], None] = lambda: None,
    keep: Collection[int] = (),
    shares: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Write a checkpoint of `state` under `folder`; drop those of later updates and all but the newest `last`.

    Those of the updates in `keep` stay, too, if they are not later ones.

    `check` is called between the parts, and may raise. Where the disk has no room for one more, older ones go first,
    except the newest. Of a state that is sharded over `shares` all ranks call, and all raise when one fails.
    """
    if shares.world_size > 1:
        _save_sharded(folder, state, fingerprint, lambda: _drop_old(folder, state.update, last, keep), check, shares)
        return
    _make_room(folder, _bytes(state))
    with atomic_path(folder / f"update-{state.update:09d}") as aside:
        aside.mkdir()
        for part, tensors in state.tensors().items():
            check()
            save_tensors(aside / f"{part}.safetensors", tensors)
        _complete(aside, state, fingerprint)
        check()
    _drop_old(folder, state.update, last, keep)


def _save_sharded(
    folder: Path,
    state: Saveable,
    fingerprint: str,
    drop: Callable[[], None],
    check: Callable[[], None],
    shares: ProcessGroup,
) -> None:
    written = folder / f".update-{state.update:09d}.shards.partial"  # beside, since all ranks must know its name

    def begin() -> None:
        check()
        _make_room(folder, _bytes(state))
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()

    def end() -> None:
        check()
        with atomic_path(folder / f"update-{state.update:09d}") as aside:
            aside.mkdir()
            written.replace(aside / SHARDS)
            _complete(aside, state, fingerprint)
            check()
        drop()

    try:
        shares.run_on_main(begin)
        write_shards(written, state.tensors())
        shares.run_on_main(end)
    finally:
        if shares.is_main_process:
            shutil.rmtree(written, ignore_errors=True)


def _complete(aside: Path, state: Saveable, fingerprint: str) -> None:
    """Write what a checkpoint holds beside tensors, the manifest last."""
    write_curves(aside / "curves.csv", state.rows, tuple(state.rows[0]) if state.rows else ())
    write_json(aside / "extra.json", state.extra)
    files = {
        str(path.relative_to(aside)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(aside.rglob("*"))
        if path.is_file()
    }
    manifest = {"fingerprint": fingerprint, "update": state.update, "seconds": state.seconds, "files": files}
    write_json(aside / "manifest.json", manifest)


def retained(updates: Iterable[int], every: int | None, best: int | None) -> set[int]:
    """Return which checkpoints stay beside the latest: the first at or after each multiple of `every`, and `best`.

    What stays once goes on staying as more come, the best until a better one does: so at most the run's updates over
    `every`, and two.
    """
    present, found, before = sorted(updates), set(), 0
    if every is not None:
        for update in present:
            if update // every > before:
                found.add(update)
            before = update // every
    if best is not None:
        found |= set([update for update in present if update >= best][:1])
    return found


def _drop_old(folder: Path, update: int, last: int, keep: Collection[int]) -> None:
    present = checkpoints(folder)
    later = [path for path in present if path.name > f"update-{update:09d}"]  # damaged, or no longer its future
    kept = {f"update-{each:09d}" for each in keep}
    for old in later + [path for path in present if path not in later][:-last]:
        if old in later or old.name not in kept:
            shutil.rmtree(old)


def load_latest(folder: Path, state: Resumable, fingerprint: str, until: int | None = None) -> list[str]:
    """Bring `state` to the newest checkpoint under `folder` that is whole; leave it as it is when there is none.

    Those of updates after `until` do not count. Returns a line for each damaged checkpoint passed over. Raises
    UserError for a checkpoint of other params.
    """
    passed_over, parts = [], list(state.tensors())
    for checkpoint in reversed(checkpoints(folder)):
        if until is not None and checkpoint.name > f"update-{until:09d}":
            continue
        damage = _damage(checkpoint, parts)
        if damage:
            passed_over.append(f"Found {checkpoint} damaged ({damage}): went on from an earlier one.")
            continue
        manifest = read_json(checkpoint / "manifest.json")
        if manifest["fingerprint"] != fingerprint:
            raise UserError(
                f"Found {checkpoint} made with other params, data or code (fingerprint {manifest['fingerprint']}), "
                f"expected {fingerprint}: delete the folder, or restore the params."
            )
        if (shards := checkpoint / SHARDS).is_dir():
            tensors = state.targets(names_in(shards))
            read_shards(shards, tensors)
        else:
            tensors = {part: load_tensors(checkpoint / f"{part}.safetensors") for part in parts}
        state.load_tensors(tensors, checkpoint)
        state.rows = read_curves(checkpoint / "curves.csv")
        state.extra = read_json(checkpoint / "extra.json")
        state.update, state.seconds = manifest["update"], manifest["seconds"]
        break
    return passed_over


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under `folder`, oldest first."""
    return sorted(folder.glob("update-*"))


def _damage(checkpoint: Path, parts: list[str]) -> str | None:
    try:
        manifest = read_json(checkpoint / "manifest.json")
        if checkpoint.name != f"update-{manifest['update']:09d}":
            return "manifest.json is of another update"
        shards = [name for name in manifest["files"] if name.startswith(f"{SHARDS}/")]
        if not shards and (checkpoint / SHARDS).exists():
            return f"manifest.json does not list {SHARDS}/"
        for name in (*BESIDES, *(shards or (f"{part}.safetensors" for part in parts))):
            path, file = checkpoint / name, manifest["files"][name]
            if path.stat().st_size != file["bytes"] or sha256_file(path) != file["sha256"]:
                return f"{name} is not what the manifest says"
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in checkpoints(folder)[:-1]:
        if shutil.disk_usage(folder).free >= needed:
            break
        shutil.rmtree(old)


def _bytes(state: Saveable) -> int:
    return sum(tensor.nbytes for tensors in state.tensors().values() for tensor in tensors.values())
