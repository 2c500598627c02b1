"""Checkpoints: written atomically in the background, and verified before use.

A checkpoint is a folder update-NNNNNNNNN with a safetensors file per part of the state, curves.csv, extra.json, and
manifest.json, which lists the size and hash of every file. The latest checkpoint is the highest one whose files match
its manifest. The checkpoint of a sharded state has shards/, with a file from each process, instead of the parts; a run
can resume from either, sharded or not.
"""

import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import load_tensors, save_tensors
from afm_pipe.runtime.errors import UnwritableError, UserError
from afm_pipe.runtime.files import atomic_path, read_json, remove_leftovers, sha256_file, write_json
from afm_pipe.runtime.machine import available_memory
from afm_pipe.training.curves import Row, scan_curves, write_curves
from afm_pipe.training.sharding import Parts, read_shards, tensor_names, write_shards
from afm_pipe.training.state import TrainingState

SECONDS, SHARE = 60.0, 0.01  # between checkpoints by default, unless they take more than this share of the time
OTHER_FILES = ("curves.csv", "extra.json")  # besides tensors
SHARDS = "shards"


class RetentionPolicy(NamedTuple):
    """Which checkpoints are retained, and how they are written. It does not affect results."""

    last: int = 2  # the latest one, and another in case it is damaged
    in_background: bool = True  # if there is memory for a copy of the state
    check_lease: Callable[[], None] = lambda: None
    """Called before a checkpoint is completed; raises UserError if this process has lost the lease on the run."""
    every: int | None = None
    """Also retain the first checkpoint at or after each multiple of this number of updates."""
    best: bool = False
    """Also retain the first checkpoint at or after the monitor's best probe."""


@dataclass
class Snapshot:
    """A copy of a state in host memory, which training does not modify."""

    update: int
    seconds: dict[str, float]
    rows: list[Row]
    extra: dict[str, Any]
    parts: Parts
    wait: Callable[[], float]
    """Waits for the copy from a GPU; returns the seconds for which the GPU copied instead of training."""
    shard_group: ProcessGroup = SINGLE_PROCESS

    @classmethod
    def of(cls, state: TrainingState) -> "Snapshot":
        """Copy a state; from a GPU into pinned memory, without waiting: `wait` before the copy is read."""
        copying = _copying(state.sums.device)
        parts = {
            part: {name: tensor.detach().to("cpu", non_blocking=True, copy=True) for name, tensor in tensors.items()}
            for part, tensors in state.tensors().items()
        }
        return cls(state.update, dict(state.seconds), list(state.rows), dict(state.extra), parts, copying())

    def tensors(self) -> Parts:
        """Return all tensors by part and name."""
        return self.parts


def _copying(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Begin to copy from a device; the result is called when all copies are queued, and returns `Snapshot.wait`."""
    if device.type != "cuda":
        return lambda: lambda: 0.0
    # Copies and updates are in the order of one stream, so that no update changes what is still to be copied.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    begin.record(stream)

    def queued() -> Callable[[], float]:
        end.record(stream)
        return waited

    def waited() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return queued


Saveable = TrainingState | Snapshot


class _CancelledError(Exception):
    """The checkpoint is no longer wanted."""


class CheckpointWriter:
    """Writes the checkpoints of a run: in a background thread during training, the last one in the foreground.

    A full disk does not end the run: the checkpoint is skipped, with a line in `notes`, and tried again when the next
    one is due; only the last one must succeed. Only an `active` writer writes: one of the processes that hold the same
    state. A sharded state is written by all processes, in the foreground, and all must save and finish at the same
    updates.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainingState,
        identity: str,
        seconds: float | None,
        retention: RetentionPolicy,
        active: bool,
    ) -> None:
        """Write checkpoints of `state` under `folder`, due every `seconds`; None: by what they cost."""
        self.folder, self.state, self.identity, self.seconds = folder, state, identity, seconds
        self.retention, self.active = retention, active
        self.notes: list[str] = []
        self.trouble = ""  # short message while checkpoints cannot be written
        self._saved_at, self._saved_update = time.monotonic(), -1
        self._cost = 0.0  # seconds for which the last checkpoint held up training
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cancelled = False

    def __enter__(self) -> "CheckpointWriter":
        if self.active and self.state.shard_group.is_main_process:
            remove_leftovers(self.folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the thread; on an interrupt, cancel its checkpoint (earlier ones remain)."""
        self._cancelled = kind is not None and not issubclass(kind, Exception)
        if self._thread is not None:
            self._thread.join()

    def due(self) -> bool:
        """Return whether a checkpoint is due and none is being written. Raises the error of the previous one."""
        writing = self._thread is not None and self._thread.is_alive()
        if not self.active or writing or time.monotonic() - self._saved_at < self.interval:
            return False
        self._collect()
        return True

    @property
    def interval(self) -> float:
        """Seconds between checkpoints."""
        return max(SECONDS, self._cost / SHARE) if self.seconds is None else self.seconds

    def save(self) -> None:
        """Write a checkpoint of the current state, in the background if there is memory for a copy."""
        self._collect()
        if not self.active:
            return
        began = time.monotonic()
        in_background = self.retention.in_background and not self.state.is_sharded
        pinned = 2 if self.state.sums.device.type == "cuda" else 1  # torch rounds pinned memory up to powers of two
        if in_background and pinned * _num_bytes(self.state) < 0.8 * available_memory():
            self._thread = threading.Thread(target=self._write, args=(Snapshot.of(self.state),), daemon=True)
            self._thread.start()
        else:
            self._write(self.state)
            self._collect()
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    def finish(self) -> None:
        """Write a checkpoint of the state unless there is one, and wait for it. Raises UserError on failure."""
        self._collect()
        if self.active and self._saved_update != self.state.update:
            self._write(self.state, last=True)
            self._collect()

    def _write(self, state: Saveable, last: bool = False) -> None:
        try:
            if isinstance(state, Snapshot):
                self._cost += state.wait()
            keep, count = self._retained(state), self.retention.last
            save_checkpoint(self.folder, state, self.identity, count, keep, self._check)
            self._saved_update, self.trouble = state.update, ""
        except _CancelledError:
            pass
        except UnwritableError as error:
            self.trouble = "disk full: no checkpoint"
            if last:
                self._error = error
            elif not self.notes:
                self.notes.append(f"update {state.update}: no checkpoint, training continues. {error}")
        except Exception as error:  # raised in the training thread by `_collect`
            self._error = error

    def _retained(self, state: Saveable) -> set[int]:
        probes = state.extra.get("monitor", {}).get("probes", ()) if self.retention.best else ()
        best = min(probes, key=lambda probe: probe["kid"], default=None)
        present = [int(path.name.removeprefix("update-")) for path in checkpoints(self.folder)]
        return retained([*present, state.update], self.retention.every, best["update"] if best else None)

    def _check(self) -> None:
        if self._cancelled:
            raise _CancelledError
        self.retention.check_lease()

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
    identity: str,
    last: int = 2,
    keep: Collection[int] = (),
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint of `state` under `folder`; remove those of later updates, and all but the newest `last`.

    Earlier ones at updates in `keep` also remain. `check` is called between the parts and may raise. If the disk is
    full, older checkpoints except the newest are removed first. For a sharded state all processes must call this, and
    all raise if one fails.
    """
    if state.shard_group.communicates:
        _save_sharded(folder, state, identity, lambda: _remove_old(folder, state.update, last, keep), check)
        return
    _make_room(folder, _num_bytes(state))
    with atomic_path(folder / f"update-{state.update:09d}") as temp:
        temp.mkdir()
        for part, tensors in state.tensors().items():
            check()
            save_tensors(temp / f"{part}.safetensors", tensors)
        _complete(temp, state, identity)
        check()
    _remove_old(folder, state.update, last, keep)


def _save_sharded(
    folder: Path, state: Saveable, identity: str, remove_old: Callable[[], None], check: Callable[[], None]
) -> None:
    group = state.shard_group
    written = folder / f".update-{state.update:09d}.shards.partial"  # a name that is the same on all processes

    def begin() -> None:
        check()
        _make_room(folder, _num_bytes(state))
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir()

    def end() -> None:
        check()
        with atomic_path(folder / f"update-{state.update:09d}") as temp:
            temp.mkdir()
            written.replace(temp / SHARDS)
            _complete(temp, state, identity)
            check()
        remove_old()

    try:
        group.run_on_main(begin)
        write_shards(written, state.tensors())
        group.run_on_main(end)
    finally:
        if group.is_main_process:
            shutil.rmtree(written, ignore_errors=True)


def _complete(temp: Path, state: Saveable, identity: str) -> None:
    """Write the files of a checkpoint other than tensors, the manifest last."""
    write_curves(temp / "curves.csv", state.rows, tuple(state.rows[0]) if state.rows else ())
    write_json(temp / "extra.json", state.extra)
    files = {
        str(path.relative_to(temp)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(temp.rglob("*"))
        if path.is_file()
    }
    manifest = {"fingerprint": identity, "update": state.update, "seconds": state.seconds, "files": files}
    write_json(temp / "manifest.json", manifest)


def retained(updates: Iterable[int], every: int | None, best: int | None) -> set[int]:
    """Return the updates of checkpoints to retain: the first at or after each multiple of `every`, and after `best`.

    A retained checkpoint stays retained as more are added (the best one, until there is a better one).
    """
    present, kept, previous = sorted(updates), set(), 0
    if every is not None:
        for update in present:
            if update // every > previous:
                kept.add(update)
            previous = update // every
    if best is not None:
        kept |= set([update for update in present if update >= best][:1])
    return kept


def _remove_old(folder: Path, update: int, last: int, keep: Collection[int]) -> None:
    present = checkpoints(folder)
    later = [path for path in present if path.name > f"update-{update:09d}"]  # damaged, or from before a rollback
    kept = {f"update-{each:09d}" for each in keep}
    for old in later + [path for path in present if path not in later][:-last]:
        if old in later or old.name not in kept:
            shutil.rmtree(old)


def load_latest(folder: Path, state: TrainingState, identity: str, until: int | None = None) -> list[str]:
    """Load the newest intact checkpoint under `folder` into `state`, if there is one.

    Ignores checkpoints of updates after `until`. Returns a line for each damaged checkpoint. Raises UserError if the
    checkpoint has another identity.
    """
    damaged, parts = [], list(state.tensors())
    for checkpoint in reversed(checkpoints(folder)):
        if until is not None and checkpoint.name > f"update-{until:09d}":
            continue
        damage = _damage(checkpoint, parts)
        if damage:
            damaged.append(f"Found {checkpoint} damaged ({damage}): using an earlier one.")
            continue
        manifest = read_json(checkpoint / "manifest.json")
        if manifest["fingerprint"] != identity:
            raise UserError(
                f"Found {checkpoint} of other params, data or versions (identity {manifest['fingerprint']}), "
                f"expected {identity}: delete the folder, or restore the params."
            )
        if (shards := checkpoint / SHARDS).is_dir():
            tensors = state.targets(tensor_names(shards))
            read_shards(shards, tensors)
        else:
            tensors = {part: load_tensors(checkpoint / f"{part}.safetensors") for part in parts}
        state.load_tensors(tensors, checkpoint)
        state.rows, _ = scan_curves(checkpoint / "curves.csv")
        state.extra = read_json(checkpoint / "extra.json")
        state.update, state.seconds = manifest["update"], manifest["seconds"]
        break
    return damaged


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under `folder`, oldest first."""
    return sorted(folder.glob("update-*"))


def _damage(checkpoint: Path, parts: list[str]) -> str | None:
    """Return what is wrong with the files of a checkpoint; None if they match the manifest."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
        if checkpoint.name != f"update-{manifest['update']:09d}":
            return "manifest.json is of another update"
        shards = [name for name in manifest["files"] if name.startswith(f"{SHARDS}/")]
        if not shards and (checkpoint / SHARDS).exists():
            return f"manifest.json does not list {SHARDS}/"
        for name in (*OTHER_FILES, *(shards or (f"{part}.safetensors" for part in parts))):
            path, file = checkpoint / name, manifest["files"][name]
            if path.stat().st_size != file["bytes"] or sha256_file(path) != file["sha256"]:
                return f"{name} does not match the manifest"
    except PermissionError:
        raise
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for old in checkpoints(folder)[:-1]:
        if shutil.disk_usage(folder).free >= needed:
            break
        shutil.rmtree(old)


def _num_bytes(state: Saveable) -> int:
    return sum(tensor.nbytes for tensors in state.tensors().values() for tensor in tensors.values())
