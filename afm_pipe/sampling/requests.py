"""Samples on request: chosen classes, a count, a grid, files by index, and interpolations between seeds."""

import difflib
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from afm_pipe.params import Sample
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path
from afm_pipe.runtime.progress import Progress
from afm_pipe.sampling.image_writers import GridWriter, ImageWriter, NpzWriter, PngWriter
from afm_pipe.sampling.sampler import Sampler, balanced_labels, labels_in_shares, seeded_noise, slerp


@dataclass(frozen=True)
class Request:
    """Which samples to draw, and where to write them. At most one of `per_class` and `count` is given."""

    classes: str | None = None
    """Numbers or names, separated by commas; default: all classes for `count`, else the first few."""
    seed: int | None = None
    per_class: int | None = None
    """Samples of each class, a class per row of the grid."""
    count: int | None = None
    """Samples in total, classes in turn or in the shares of `class_counts`."""
    class_counts: Sequence[int] | None = None
    """Of all classes, in order."""
    rows: int | None = None
    """Upper bound of the number of classes, where `classes` names none."""
    steps: int | None = None
    grid: Path | None = None
    images: Path | None = None
    npz: Path | None = None
    adm_npz: Path | None = None
    """The same for ADM's evaluator: RGB, shuffled."""
    interpolate: str | None = None
    """Seeds, separated by commas: frames from each to the next, a class per row."""
    frames: int = 8

    def __bool__(self) -> bool:
        """Return whether the request names anything."""
        return self != Request(frames=self.frames)

    @property
    def seeds(self) -> list[int]:
        """The seeds to interpolate between. Raises UserError for anything but two numbers or more."""
        parts = [part.strip() for part in str(self.interpolate).split(",")]
        if len(parts) < 2 or not all(part.isdecimal() for part in parts):
            raise UserError(f"Found --interpolate {self.interpolate}, expected two seeds or more, such as 0,1,2.")
        return [int(part) for part in parts]


class Drawn(NamedTuple):
    """What was drawn, and how fast: seconds for one latent; images per second in micro-batches, with decoding."""

    labels: Tensor
    steps: int
    latency: float
    throughput: float

    def describe(self) -> str:
        """Return two lines of text."""
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        return (
            f"{len(self.labels)} images of {len(self.labels.unique())} classes in {steps}.\n"
            f"Latency {1000 * self.latency:.1f} ms for one latent (batch 1, {steps}, median, without decoding); "
            f"throughput {self.throughput:.1f} images/s (micro-batches, with decoding)."
        )


def draw(sampler: Sampler, request: Request, defaults: Sample) -> Generator[Progress, None, Drawn | None]:
    """Draw the requested samples and write their files, each file whole or not at all.

    `defaults` give the seed, the samples per class and the number of classes that the request leaves out. Image i
    depends on seed + i and its class alone, whatever else is drawn. Memory does not grow with the number of images,
    except for a grid. Every process of the sampler's group calls it; the main process writes, and the others return
    None. Raises UserError, before any sampling, for unknown classes and for steps the generator was not trained for.
    """
    steps = sampler.generator.num_steps(request.steps)
    seed = defaults.seed if request.seed is None else request.seed
    labels, noise, columns = _resolve(sampler, request, seed, defaults)
    is_main = sampler.group.is_main_process
    latency = sampler.latency(steps) if is_main else 0.0
    started, done, computed = time.monotonic(), 0, 0
    with ExitStack() as stack:
        writers = _open_writers(request, labels, columns, seed, stack) if is_main else []
        for images in sampler.stream(labels, noise, steps):
            for writer in writers:
                writer.add(images)
            done, computed = done + len(images), computed + sampler.micro_batch
            yield Progress(done, len(labels), "images")
        for writer in writers:
            writer.finish()
        seconds = time.monotonic() - started
    return Drawn(labels, steps, latency, computed / seconds) if is_main else None


def _resolve(sampler: Sampler, request: Request, seed: int, defaults: Sample) -> tuple[Tensor, int | Tensor, int]:
    """Return the labels of all samples, their noise (see `Sampler`), and the number of columns of a grid."""
    num_classes = len(sampler.class_names)
    chosen = None if request.classes is None else torch.tensor(choose_classes(request.classes, sampler.class_names))
    if request.count is not None and request.class_counts is not None:
        return labels_in_shares(request.count, request.class_counts), seed, min(request.count, num_classes, 16)
    if request.count is not None:
        every = torch.arange(num_classes) if chosen is None else chosen
        return every[balanced_labels(range(request.count), len(every))], seed, min(request.count, len(every), 16)
    rows = torch.arange(num_classes)[: defaults.classes][: request.rows] if chosen is None else chosen
    if request.interpolate is None:
        columns = request.per_class or defaults.per_class
        return rows.repeat_interleave(columns), seed, columns
    ends = [seeded_noise(seed, [0], sampler.latent_shape)[0] for seed in request.seeds]
    strip = [ends[0]]
    for first, second in zip(ends, ends[1:], strict=False):
        strip += [slerp(first, second, k / (request.frames - 1)) for k in range(1, request.frames - 1)] + [second]
    return rows.repeat_interleave(len(strip)), torch.stack(strip), len(strip)


def check_request(request: Request) -> None:
    """Raise UserError for a request that contradicts itself, names no output, or would overwrite other files."""
    for option, number, least in (
        ("--per-class", request.per_class, 1),
        ("--count", request.count, 1),
        ("--steps", request.steps, 1),
        ("--frames", request.frames, 2),
    ):
        if number is not None and number < least:
            raise UserError(f"Found {option} {number}, expected at least {least}.")
    if request.per_class is not None and request.count is not None:
        raise UserError("Found both --per-class and --count, expected one: samples per class or samples in total.")
    if request.interpolate is not None and (request.per_class or request.count or request.seed is not None):
        raise UserError(
            "Found --interpolate with --seed, --per-class or --count, expected it to name the seeds itself."
        )
    if not any((request.grid, request.images, request.npz, request.adm_npz)):
        raise UserError("Found no place for the samples, expected --grid FILE.png, --images FOLDER or --npz FILE.npz.")
    files = ("--grid", request.grid, ".png"), ("--npz", request.npz, ".npz"), ("--out", request.adm_npz, ".npz")
    for option, path, suffix in files:
        if path is not None and (path.suffix != suffix or path.is_dir()):
            raise UserError(f"Found {option} {path}, expected the name of a file that ends in {suffix}.")
    folder = request.images
    if folder is not None and folder.exists():
        other = [path.name for path in folder.iterdir() if not _is_numbered(path)] if folder.is_dir() else ["no folder"]
        if other:
            raise UserError(
                f"Found --images {folder} with {other[0]}, expected a new folder or one of numbered PNG files, which "
                "are replaced: name another."
            )


def choose_classes(text: str, names: Sequence[str]) -> list[int]:
    """Return the classes of numbers or names separated by commas; a name takes precedence over a number.

    Raises UserError with similar names for an unknown name, and with the classes that share an ambiguous one.
    """
    return [_class(part.strip(), names) for part in text.split(",")]


def _class(text: str, names: Sequence[str]) -> int:
    for fold in (str, str.casefold):
        found = [label for label, name in enumerate(names) if fold(name) == fold(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"Found {len(found)} classes named {text!r}, expected one: say {' or '.join(map(str, found))}."
            )
    if text.isdecimal():
        if int(text) < len(names):
            return int(text)
        raise UserError(f"Found class {text}, expected a number below {len(names)}, the number of classes.")
    folded = {name.casefold(): name for name in names}
    similar = difflib.get_close_matches(text.casefold(), folded, n=3, cutoff=0.5)
    similar += [name for name in folded if text and text.casefold() in name and name not in similar][:3]
    hint = (
        f"did you mean {', '.join(folded[name] for name in similar)}?"
        if similar
        else f"such as {', '.join(names[:3])}."
    )
    raise UserError(f"Found no class {text!r}, expected a number below {len(names)} or a name; {hint}")


def _open_writers(request: Request, labels: Tensor, columns: int, seed: int, stack: ExitStack) -> list[ImageWriter]:
    """Open the requested files; each replaces its target when the stack is left without an error."""
    writers: list[ImageWriter] = []
    if request.grid is not None:
        writers.append(GridWriter(stack.enter_context(atomic_path(request.grid)), columns))
    if request.images is not None:
        writers.append(PngWriter(stack.enter_context(atomic_path(request.images))))
    if request.npz is not None:
        writers.append(NpzWriter(stack.enter_context(atomic_path(request.npz)), labels))
    if request.adm_npz is not None:
        writers.append(NpzWriter(stack.enter_context(atomic_path(request.adm_npz)), labels, shuffle_seed=seed))
    return writers


def _is_numbered(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.isdecimal() and path.is_file()
