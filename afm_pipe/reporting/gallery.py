"""The pictures of the page: samples side by side, interpolations between seeds, and nearest training images."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from afm_pipe.reporting.inputs import Inputs, RunRecord, stage_of
from afm_pipe.reporting.pictures import Picture, inline, open_png
from afm_pipe.runtime import paths

PICTURE_BYTES = 3 * 2**19  # of all pictures on the page; base64 makes them a third larger: the page stays below 3 MB
PHOTOS = paths.RESULTS / "photos64"  # the committed results of the profile photos64
SIDE_BY_SIDE = 2  # seeds of each class, the first of the grid
GAP = 2  # pixels between a grid's pictures
RUN_PICTURES = {  # name of the file: its stage, and its alternative text
    "grid": ("sample", "Samples of run {run}, one row per class: {classes}"),
    "interpolation": ("sample", "Samples of run {run} along great arcs from seed to seed, one row per class"),
    "nearest": ("evaluate", "Samples of run {run}, each above the training images nearest to it in pixels"),
}


class Gallery(NamedTuple):
    """Pictures of all runs, ready for the page."""

    side_by_side: list[tuple[str, Picture]]
    """Run and its samples of the same seeds; the name is empty for real images and reconstructions."""
    strips: list[Picture]
    nearest: list[Picture]


def gallery(inputs: Inputs) -> Gallery:
    """Read the pictures of all runs. Raises UserError naming the stage of a missing one."""
    sampling = inputs.params.sample
    share = _share(inputs)
    width = GAP + min(SIDE_BY_SIDE, sampling.per_class) * (inputs.params.data.image_size + GAP)
    side_by_side = []
    for name, (title, path, stage) in zip(("", "", *inputs.params.names), _grids(inputs), strict=True):
        what = f"Samples of run {name} from the same {SIDE_BY_SIDE} seeds as every run" if name else title
        alt = f"{what}, one row per class: {class_list(inputs)}"
        side_by_side.append((name, inline(path, stage, alt, title, share, width)))
    strips, nearest = (
        [run_picture(inputs, record, kind, record.name, share) for record in inputs.runs]
        for kind in ("interpolation", "nearest")
    )
    return Gallery(side_by_side, strips, nearest)


def opening(inputs: Inputs, run: str) -> list[Picture]:
    """Return the pictures that open the page: real images, samples of a run, and photographs if they were sampled."""
    share = _share(inputs)
    real = _grids(inputs)[0]
    alt = f"Real images, one row per class: {class_list(inputs)}"
    caption = f"Samples of {run}, one row per class"
    found = [
        inline(real[1], real[2], alt, "Real images", share),
        run_picture(inputs, inputs.record(run), "grid", caption, share),
    ]
    photos = PHOTOS / "samples.png"
    if photos.is_file() and inputs.params.data.source != "clothing":
        alt = "Samples of photographs of clothes, one row per class, of the profile photos64"
        picture = inline(photos, "report", alt, "Samples of photographs, of the profile photos64", 2 * share)
        page = PHOTOS / "report" / "index.html"
        found.append(picture._replace(source=str(page)) if page.is_file() else picture)
    return found


def run_picture(inputs: Inputs, record: RunRecord, name: str, caption: str, max_bytes: int) -> Picture:
    """Return one of a run's `RUN_PICTURES`."""
    verb, alt = RUN_PICTURES[name]
    path, stage = paths.samples(record.name) / f"{name}.png", stage_of(inputs.params, verb, record.name)
    return inline(path, stage, alt.format(run=record.name, classes=class_list(inputs)), caption, max_bytes)


def tiles(inputs: Inputs) -> list[tuple[str, Image.Image]]:
    """Return the titled grids of samples.png."""
    return [(title, open_png(path, stage)) for title, path, stage in _grids(inputs)]


def class_list(inputs: Inputs, most: int = 10) -> str:
    """Return the names of the classes in a grid's rows."""
    shown = inputs.summary.classes[: inputs.params.sample.classes]
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")


def _share(inputs: Inputs) -> int:
    """Return the bytes of one picture: real images and samples twice, three pictures per run, photographs twice one."""
    return PICTURE_BYTES // (6 + 3 * len(inputs.runs))


def _grids(inputs: Inputs) -> list[tuple[str, Path, str]]:
    """Return title, path and stage of the grids of real images, their reconstructions, and every run."""
    return [
        ("Real images", paths.REFERENCE / "real.png", "reference"),
        ("Reconstructed", paths.REFERENCE / "reconstructed.png", "reference"),
        *(
            (name, paths.samples(name) / "grid.png", stage_of(inputs.params, "sample", name))
            for name in inputs.params.names
        ),
    ]
