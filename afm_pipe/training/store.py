"""The folder of a run under work/: rows of its curves, its events, checkpoints and kept weights.

    curves.csv       rows so far          events.jsonl    the event log
    checkpoints/     the newest           good/           where a rollback goes back to
    adversaries/     earlier adversaries  kept/           moving averages after some updates

Rows and events that count are in the checkpoints; both files are written anew at every start, so that after a kill they
are those of a run never killed.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor, nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import load_exactly, load_tensors, save_tensors
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, remove_leftovers
from afm_pipe.training.curves import Row, append_curve, read_curves, write_curves
from afm_pipe.training.events import FILE, Event, append_event, read_events, write_events
from afm_pipe.training.sharding import placed, whole


class RunStore:
    """Reads and writes the folder of a run; of several processes the main one writes."""

    def __init__(self, folder: Path, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.folder, self.group = folder, group

    @property
    def curves(self) -> Path:
        """The rows so far."""
        return self.folder / "curves.csv"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def good(self) -> Path:
        """Where the checkpoints are that a rollback goes back to."""
        return self.folder / "good"

    def clean(self) -> None:
        """Remove what unfinished writes left."""
        if self.group.is_main_process:
            for folder in (self.folder, *self.folder.glob("*/")):
                remove_leftovers(folder)

    def write_rows(self, rows: Sequence[Row], columns: tuple[str, ...]) -> None:
        """Write the curves anew."""
        if self.group.is_main_process:
            write_curves(self.curves, rows, columns)

    def append_row(self, row: Row) -> None:
        """Append a row to the curves."""
        if self.group.is_main_process:
            append_curve(self.curves, row)

    def read_rows(self) -> list[Row]:
        """Return the rows written so far."""
        return read_curves(self.curves)

    def write_events(self, events: Sequence[Event]) -> None:
        """Write the event log anew."""
        if self.group.is_main_process:
            write_events(self.folder / FILE, events)

    def append_event(self, event: Event) -> None:
        """Append an event to the log."""
        if self.group.is_main_process:
            append_event(self.folder / FILE, event)

    def read_events(self) -> list[Event]:
        """Return the events logged so far."""
        return read_events(self.folder / FILE)

    def kept(self, update: int) -> Path:
        """Return where the moving average after an update is kept, if it is."""
        return self.folder / "kept" / f"update-{update:09d}.safetensors"

    def adversary(self, update: int, of: str = "probe") -> Path:
        """Return where the adversary after an update is kept, of a probe or of a phase's start."""
        return self.folder / "adversaries" / f"{of}-{update:09d}.safetensors"

    def keep_adversaries(self, updates: Collection[int]) -> None:
        """Remove the adversaries of all probes but those after some updates."""
        wanted = {self.adversary(update) for update in updates}
        for path in set((self.folder / "adversaries").glob("probe-*")) - wanted:
            path.unlink()

    def save(self, path: Path, network: nn.Module) -> None:
        """Write a network's weights whole; all processes must call."""
        tensors = whole(network.state_dict(), self.group)
        if self.group.is_main_process:
            with atomic_path(path) as aside:
                save_tensors(aside, tensors)
        self.group.barrier()

    def load(self, path: Path, network: nn.Module) -> None:
        """Load a network's weights. Raises UserError when the file is missing or of another network."""
        if not path.is_file():
            raise UserError(f"Found no {path}, which the run goes back to: remove {self.folder} and train again.")
        load_exactly(network, placed(load_tensors(path), network.state_dict()), path)

    def load_kept(self, update: int) -> dict[str, Tensor]:
        """Return the moving average kept after an update."""
        return load_tensors(self.kept(update))
