"""The folder of a run under work/: curves, events, checkpoints and saved weights.

    curves.csv       rows so far          events.jsonl    the event log
    checkpoints/     newest checkpoints   good/           checkpoints for rollbacks
    adversaries/     earlier adversaries  kept/           EMA weights after certain updates
    selected/        the best EMA weights so far

The checkpoints hold the authoritative rows and events; both files are rewritten from them whenever a run starts or
resumes, so that they equal those of an uninterrupted run.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import load_exactly, load_tensors, save_tensors
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json, remove_leftovers
from afm_pipe.training.checkpoints import checkpoints
from afm_pipe.training.curves import Row, append_curve, write_curves
from afm_pipe.training.events import FILE, Event, append_event, scan_events, write_events
from afm_pipe.training.sharding import full_tensors, shard_like


class RunStore:
    """Reads and writes the folder of a run; only the main process writes."""

    def __init__(self, folder: Path, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.folder, self.group = folder, group

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def good(self) -> Path:
        """The folder of checkpoints for rollbacks."""
        return self.folder / "good"

    def clean(self) -> None:
        """Remove temporary files of unfinished writes."""
        if self.group.is_main_process:
            for folder in (self.folder, *self.folder.glob("*/")):
                remove_leftovers(folder)

    def write_rows(self, rows: Sequence[Row], columns: tuple[str, ...]) -> None:
        """Rewrite the curves."""
        if self.group.is_main_process:
            write_curves(self.folder / "curves.csv", rows, columns)

    def append_row(self, row: Row) -> None:
        """Append a row to the curves."""
        if self.group.is_main_process:
            append_curve(self.folder / "curves.csv", row)

    def write_events(self, events: Sequence[Event]) -> None:
        """Rewrite the event log."""
        if self.group.is_main_process:
            write_events(self.folder / FILE, events)

    def append_event(self, event: Event) -> None:
        """Append an event to the log."""
        if self.group.is_main_process:
            append_event(self.folder / FILE, event)

    def read_events(self) -> list[Event]:
        """Return the events logged so far."""
        return scan_events(self.folder / FILE)[0]

    def kept(self, update: int) -> Path:
        """Return the file of the EMA weights after an update in `Task.keep_at`."""
        return self.folder / "kept" / f"update-{update:09d}.safetensors"

    def adversary(self, update: int, reason: Literal["probe", "epoch"] = "probe") -> Path:
        """Return the file of the adversary after an update, saved for the monitor or for a phase that reloads it."""
        return self.folder / "adversaries" / f"{reason}-{update:09d}.safetensors"

    def selected(self, update: int) -> Path:
        """Return the file of the EMA weights after an update, saved while they are the best."""
        return self.folder / "selected" / f"update-{update:09d}.safetensors"

    def prune_selected(self, updates: Collection[int]) -> None:
        """Remove the selected EMA weights of all updates except `updates`."""
        if self.group.is_main_process:
            wanted = {self.selected(update) for update in updates}
            for path in set((self.folder / "selected").glob("update-*")) - wanted:
                path.unlink()

    def remembered(self, owner: str, *folders: Path) -> list[Any]:
        """Return the state of a callback in all checkpoints of some folders."""
        states = []
        for checkpoint in (each for folder in folders for each in checkpoints(folder)):
            try:
                extra = read_json(checkpoint / "extra.json")
            except UserError:  # damaged, or being removed: nothing resumes from it
                continue
            if owner in extra:
                states.append(extra[owner])
        return states

    def prune_adversaries(self, updates: Collection[int]) -> None:
        """Remove the adversaries saved for the monitor, except those of `updates`."""
        for path in set((self.folder / "adversaries").glob("probe-*")) - {self.adversary(each) for each in updates}:
            path.unlink()

    def save(self, path: Path, network: nn.Module) -> None:
        """Write the full weights of a network; all processes must call this."""
        tensors = full_tensors(network.state_dict(), self.group)
        if self.group.is_main_process:
            with atomic_path(path) as temp:
                save_tensors(temp, tensors)
        self.group.barrier()

    def load(self, path: Path, network: nn.Module) -> None:
        """Load the weights of a network. Raises UserError if the file is missing or does not match."""
        if not path.is_file():
            raise UserError(f"Found no {path}, which the run needs to reload: remove {self.folder} and train again.")
        load_exactly(network, shard_like(load_tensors(path), network.state_dict()), path)

    def load_kept(self, update: int) -> dict[str, Tensor]:
        """Return the EMA weights after an update in `Task.keep_at`."""
        return load_tensors(self.kept(update))
