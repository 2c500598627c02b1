"""Which pictures the page shows: samples side by side, strips from seed to seed, grids, and the check for copies."""

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from afm_pipe.reporting import pictures
from afm_pipe.reporting.inputs import Inputs, RunRecord, stage_of
from afm_pipe.reporting.pictures import Picture
from afm_pipe.runtime import paths

PICTURE_BYTES = 6 * 2**20  # of all pictures on the page, before base64 adds a third: it stays under 10 MiB
SIDE_BY_SIDE = 2  # seeds of each class, the first of the grid
GAP = 2  # between a grid's pictures, as drawn


class Gallery(NamedTuple):
    """Pictures of all runs, ready for the page."""

    beside: list[tuple[str, Picture]]  # a run's name, or nothing for real images, over the same seeds of every run
    strips: list[Picture]
    nearest: list[Picture]


def gallery(inputs: Inputs) -> Gallery:
    """Read what the page shows of all runs. Raises UserError naming the stage of a picture that is missing."""
    share = PICTURE_BYTES // (2 + 3 * max(len(inputs.runs), 1))
    rows = f"one row per class: {class_list(inputs)}"
    beside = []
    for title, name in (("Real images", "real"), ("Reconstructed", "reconstructed")):
        alt = f"{title}, {rows}"
        beside.append(
            ("", pictures.inline(_columns(inputs, paths.REFERENCE / f"{name}.png", "reference"), alt, title, share))
        )
    strips, nearest = [], []
    for record in inputs.runs:
        stage = stage_of(inputs.params, "sample", record.name)
        alt = f"Samples of run {record.name} from the same {SIDE_BY_SIDE} seeds as every run, {rows}"
        columns = _columns(inputs, paths.samples(record.name) / "grid.png", stage)
        beside.append((record.name, pictures.inline(columns, alt, record.name, share)))
        strips.append(strip(inputs, record, share))
        nearest.append(nearest_picture(inputs, record, share))
    return Gallery(beside, strips, nearest)


def grid(inputs: Inputs, record: RunRecord, max_bytes: int) -> Picture:
    """Return a run's whole grid."""
    stage, alt = stage_of(inputs.params, "sample", record.name), f"Samples of run {record.name}, one row per class"
    path = paths.samples(record.name) / "grid.png"
    return pictures.inline(pictures.read(path, stage), f"{alt}: {class_list(inputs)}", "Samples", max_bytes)


def strip(inputs: Inputs, record: RunRecord, max_bytes: int) -> Picture:
    """Return a run's strips from seed to seed."""
    stage, path = stage_of(inputs.params, "sample", record.name), paths.samples(record.name) / "interpolation.png"
    alt = f"Samples of run {record.name} along great arcs from seed to seed, one row per class"
    return pictures.inline(pictures.read(path, stage), alt, record.name, max_bytes)


def nearest_picture(inputs: Inputs, record: RunRecord, max_bytes: int) -> Picture:
    """Return a run's samples above the training images nearest to them."""
    stage, path = stage_of(inputs.params, "evaluate", record.name), paths.samples(record.name) / "nearest.png"
    alt = f"Samples of run {record.name}, each above the training images nearest to it in pixels"
    return pictures.inline(pictures.read(path, stage), alt, record.name, max_bytes)


def tiles(inputs: Inputs) -> list[tuple[str, Image.Image]]:
    """Return the titled grids of the sheet that stands as a file of its own."""
    real = [(title, paths.REFERENCE / f"{title}.png", "reference") for title in ("real", "reconstructed")]
    runs = [
        (run.name, paths.samples(run.name) / "grid.png", stage_of(inputs.params, "sample", run.name))
        for run in inputs.runs
    ]
    return [(title, pictures.open_png(path, stage)) for title, path, stage in real + runs]


def class_list(inputs: Inputs, most: int = 10) -> str:
    """Name the classes that a grid's rows show."""
    shown = inputs.summary.classes[: min(most, inputs.params.sample.classes)]
    more = min(inputs.params.sample.classes, len(inputs.summary.classes)) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _columns(inputs: Inputs, path: Path, stage: str) -> pictures.Source:
    """Return the first columns of a grid, which are its first seeds."""
    image = pictures.open_png(path, stage)
    width = GAP + min(SIDE_BY_SIDE, inputs.params.sample.per_class) * (inputs.params.data.image_size + GAP)
    if width >= image.width:
        return pictures.read(path, stage)
    cut = image.crop((0, 0, width, image.height))
    if inputs.params.data.channels == 1:
        cut = cut.convert("L")
    buffer = io.BytesIO()
    cut.save(buffer, "PNG", optimize=True)
    return pictures.Source(path, cut, buffer.getvalue())
