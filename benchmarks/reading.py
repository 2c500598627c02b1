"""Random batches of latents from the HDF5 file, beside an array in memory and plain reads."""

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from afm_pipe.data.latents import Latents
from afm_pipe.params import Params
from benchmarks.inputs import latents_file
from benchmarks.measuring import Row, in_turns, speed_row

BATCH, BATCHES = 64, 40
SHAPE = (4, 32, 32)


def latents(params: Params, quick: bool) -> Iterator[Row]:
    """Warm, cold, and dropped before each batch, which stands for a file larger than the page cache."""
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that data/ is on; /tmp may be memory
        path = Path(folder) / "latents.h5"
        file = latents_file(path, 2048 if quick else 16384, SHAPE)
        memory: Latents = copy.copy(file)  # the same reader...
        memory.__dict__["_rows"] = np.array(file._rows)  # ...over an array
        random = np.random.default_rng(1)
        rows = random.integers(0, file.num_images, (BATCHES, BATCH))
        row_bytes = file._rows[0].nbytes

        def read(latents: Latents) -> None:
            for batch in rows:
                latents.read(batch, np.zeros(BATCH, np.int64))

        def gather(array: np.ndarray) -> None:
            for batch in rows:
                np.take(array, batch, axis=0)

        seconds = in_turns(
            3 if quick else 15,
            file_rows=lambda: gather(file._rows),
            memory_rows=lambda: gather(memory._rows),
            file_moments=lambda: read(file),
            memory_moments=lambda: read(memory),
        )
        options = {"per": BATCHES, "unit": "batches/s"}
        what = f"{file.num_images * row_bytes / 1e6:.0f} MB of 16 KB rows, batches of {BATCH}"
        yield speed_row(
            "latents", f"{what}, warm", seconds, "file_rows", "memory_rows", "row gather from an array in memory",
            bar=">= 0.5", **options,
        )  # fmt: skip
        yield speed_row(
            "latents", f"{what}, warm, as float32 moments", seconds, "file_moments", "memory_moments",
            "the same reader over an array in memory", **options,
        )  # fmt: skip
        file.__dict__.pop("_rows")  # unmapped: what is mapped is not dropped

        def cold(batches: np.ndarray, each: bool) -> None:
            fresh = copy.copy(unmapped)  # mapped anew: what is mapped is not dropped
            for batch in batches:
                if each:
                    fresh = copy.copy(unmapped)
                    _drop(path)
                fresh.read(batch, np.zeros(BATCH, np.int64))

        def plain(batches: np.ndarray, each: bool) -> None:
            with path.open("rb") as opened:
                for batch in batches:
                    if each:
                        _drop(path)
                    for row in batch:
                        os.pread(opened.fileno(), row_bytes, memory._offset + int(row) * row_bytes)

        unmapped = copy.copy(memory)
        few = rows[:8]
        rounds = 2 if quick else 8
        for title, each in (("dropped from memory before", False), ("dropped before each batch", True)):
            works = {"ours": lambda each=each: cold(few, each), "plain": lambda each=each: plain(few, each)}
            seconds = in_turns(rounds, warm=0, before=lambda: _drop(path), **works)
            yield speed_row(
                "latents", f"{what}, {title}", seconds, "ours", "plain", "plain reads of the same rows",
                per=len(few), unit="batches/s",
            )  # fmt: skip


def _drop(path: Path) -> None:
    """Drop a file from the page cache; nothing may have it mapped."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
