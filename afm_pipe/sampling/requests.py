"""Samples as asked for: chosen classes, a count, a grid, files by index, and strips from seed to seed.

Shapes: B samples, F frames, (c, h, w) latents, (C, H, W) images.
"""

import difflib
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from afm_pipe.distributed.mapping import map_across_ranks
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.flow import Flow
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path
from afm_pipe.runtime.progress import Progress
from afm_pipe.sampling.generate import generate_images, grid, images_of, micro_batches, noise
from afm_pipe.sampling.image_writers import GridFile, ImageFile, NpzFile, PngFolder

LATENCY_RUNS, LATENCY_SECONDS = 5, 10.0  # timed passes of one latent: so many, or as many as fit
STRIP_ROWS, STRIP_FRAMES = 5, 5  # of the report's strips
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """What a person asks for. Of `per_class` (rows of classes) and `count` (classes in turn) at most one is given."""

    classes: str | None = None
    """Numbers or names, separated by commas; left out: all for `count`, else the first few."""
    seed: int | None = None
    per_class: int | None = None
    count: int | None = None
    steps: int | None = None
    grid: Path | None = None
    images: Path | None = None
    npz: Path | None = None
    interpolate: str | None = None
    """Seeds, separated by commas: frames from each to the next, one row per class."""
    frames: int = 8

    def __bool__(self) -> bool:
        """Tell whether anything was asked for."""
        return self != Request(frames=self.frames)

    @property
    def seeds(self) -> list[int]:
        """The seeds to interpolate between. Raises UserError when they are not numbers, or fewer than two."""
        parts = [part.strip() for part in str(self.interpolate).split(",")]
        if len(parts) < 2 or not all(part.isdecimal() for part in parts):
            raise UserError(f"Found --interpolate {self.interpolate}, expected two seeds or more, such as 0,1,2.")
        return [int(part) for part in parts]


class Drawn(NamedTuple):
    """What was drawn and how fast: seconds for one latent, images a second in whole batches with decoding."""

    labels: list[int]
    steps: int
    latency: float
    throughput: float

    def words(self) -> str:
        """Say it in two lines."""
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        return (
            f"{len(self.labels)} images of {len(set(self.labels))} classes in {steps}.\n"
            f"Latency {1000 * self.latency:.1f} ms for one latent (batch 1, {steps}, median, without decoding); "
            f"throughput {self.throughput:.1f} images/s (whole batches, with decoding)."
        )


class Sampler(NamedTuple):
    """A generator with all it takes to draw from it."""

    generator: Flow
    vae: Any
    latent_shape: tuple[int, int, int]
    class_names: list[str]
    micro_batch: int
    device: torch.device = CPU


def draw(
    sampler: Sampler, request: Request, seed: int, per_class: int, rows: int, ranks: ProcessGroup = SINGLE_PROCESS
) -> Generator[Progress, None, Drawn]:
    """Draw what is asked for and write it, each file whole or not at all; return what it was and how fast.

    `seed`, `per_class` and `rows` (the first so many classes) stand in for what the request leaves out. Image i comes
    from seed + i and its class alone, whatever else is drawn. Memory does not grow with the number of images, but for
    a grid. Of several `ranks` the first calls this and the others `assist`, with the same arguments. Raises UserError,
    before any sampling, for classes there are not and steps it was not trained for.
    """
    labels, columns, steps, batches = _asked(sampler, request, seed, per_class, rows, ranks)
    latency = measure_latency(sampler, steps)
    started, computed = time.monotonic(), 0
    with ExitStack() as stack:
        files = _open_files(request, labels, columns, stack)
        done = 0
        for images in batches:
            for file in files:
                file.add(images)
            done, computed = done + len(images), computed + sampler.micro_batch
            yield Progress(done, len(labels), "images")
        for file in files:
            file.finish()
        seconds = time.monotonic() - started
    return Drawn(labels, steps, latency, computed / seconds)


def assist(sampler: Sampler, request: Request, seed: int, per_class: int, rows: int, ranks: ProcessGroup) -> None:
    """Compute this rank's share of what the first rank draws."""
    *_, batches = _asked(sampler, request, seed, per_class, rows, ranks)
    for _ in batches:
        pass


def _asked(
    sampler: Sampler, request: Request, seed: int, per_class: int, rows: int, ranks: ProcessGroup
) -> tuple[list[int], int, int, Iterator[Tensor]]:
    """Return labels, images in a row of a grid, steps, and batches of images, which the first rank gets."""
    steps = sampler.generator.num_steps(request.steps)
    seed = seed if request.seed is None else request.seed
    asked = None if request.classes is None else choose_classes(request.classes, sampler.class_names)
    some = list(range(min(rows, len(sampler.class_names))))
    if request.interpolate is not None:
        labels, columns, batches = _strips(sampler, request, asked or some, steps, ranks)
    else:
        if request.count is not None:
            every = asked or list(range(len(sampler.class_names)))
            labels, columns = [every[i % len(every)] for i in range(request.count)], min(request.count, len(every), 16)
        else:
            columns = request.per_class or per_class
            labels = [label for label in asked or some for _ in range(columns)]
        batches = _in_turn(sampler, seed, labels, steps, ranks)
    return labels, columns, steps, batches


def draw_interpolation(sampler: Sampler, seed: int, rows: int) -> Image.Image:
    """Draw the report's strips: from `seed` over the next two, the first few classes in rows."""
    request = Request(interpolate=",".join(str(seed + step) for step in range(3)), frames=STRIP_FRAMES)
    classes = list(range(min(rows, STRIP_ROWS, len(sampler.class_names))))
    _, columns, batches = _strips(sampler, request, classes, sampler.generator.num_steps(None))
    return grid(torch.cat(list(batches)), columns)


def check_request(request: Request) -> None:
    """Raise UserError when a request contradicts itself, has nowhere to go, or would overwrite what is not its own."""
    for option, number, least in (
        ("--per-class", request.per_class, 1),
        ("--count", request.count, 1),
        ("--steps", request.steps, 1),
        ("--frames", request.frames, 2),
    ):
        if number is not None and number < least:
            raise UserError(f"Found {option} {number}, expected at least {least}.")
    if request.per_class is not None and request.count is not None:
        raise UserError("Found both --per-class and --count, expected one: so many of each class, or so many in all.")
    if request.interpolate is not None and (request.per_class or request.count or request.seed is not None):
        raise UserError(
            "Found --interpolate with --seed, --per-class or --count, expected it to name the seeds itself."
        )
    if request.grid is None and request.images is None and request.npz is None:
        raise UserError("Found no place for the samples, expected --grid FILE.png, --images FOLDER or --npz FILE.npz.")
    for option, path, suffix in (("--grid", request.grid, ".png"), ("--npz", request.npz, ".npz")):
        if path is not None and (path.suffix != suffix or path.is_dir()):
            raise UserError(f"Found {option} {path}, expected the name of a file that ends in {suffix}.")
    folder = request.images
    if folder is not None and folder.exists():
        strange = [] if not folder.is_dir() else [p.name for p in folder.iterdir() if not _is_numbered(p)]
        if strange or not folder.is_dir():
            raise UserError(
                f"Found --images {folder} holding {strange[0] if strange else 'a file'}, expected a new folder or one "
                "of numbered PNG files, which are replaced: name another."
            )


def choose_classes(text: str, names: Sequence[str]) -> list[int]:
    """Return the classes that numbers or names, separated by commas, mean; a name comes before a number.

    Raises UserError naming what is near for a name that is unknown, or the classes that share it.
    """
    return [_class(part.strip(), names) for part in text.split(",")]


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return the point that is `share` of the way on the great arc between two noises of one shape."""
    a, b = first.flatten().double(), second.flatten().double()
    angle = torch.arccos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if angle < 1e-6:
        return first.clone()
    mixed = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return mixed.view_as(first).to(first.dtype)


@torch.inference_mode()
def measure_latency(sampler: Sampler, steps: int) -> float:
    """Return the median seconds of one latent from noise, batch 1, after one pass to warm up; without decoding."""
    z, label = noise(0, [0], sampler.latent_shape).to(sampler.device), torch.zeros(1, dtype=torch.int64)
    label, seconds = label.to(sampler.device), []
    for _ in range(LATENCY_RUNS + 1):
        started = time.perf_counter()
        sampler.generator.sample(z, label, steps)
        if sampler.device.type == "cuda":
            torch.cuda.synchronize(sampler.device)
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > LATENCY_SECONDS:
            break
    return statistics.median(seconds[1:] or seconds)


def _in_turn(sampler: Sampler, seed: int, labels: list[int], steps: int, ranks: ProcessGroup) -> Iterator[Tensor]:
    """Yield images (B, C, H, W) uint8 of indices 0, 1, ... a micro-batch at a time, on the first rank."""
    generator, vae, shape, _, size, device = sampler

    def generated(indices: range) -> list[Tensor]:
        chosen = torch.tensor(labels[indices.start : indices.stop])
        return [generate_images(generator, vae, seed, indices, chosen, shape, size, device, steps)]

    for _, (images,) in map_across_ranks(micro_batches(range(len(labels)), size), generated, ranks):
        yield images


def _strips(
    sampler: Sampler, request: Request, classes: list[int], steps: int, ranks: ProcessGroup = SINGLE_PROCESS
) -> tuple[list[int], int, Iterator[Tensor]]:
    """Return labels, frames in a row, and batches of images: from each seed to the next, both shown, in each class."""
    ends = [noise(seed, [0], sampler.latent_shape)[0] for seed in request.seeds]
    strip = [ends[0]]
    for first, second in zip(ends, ends[1:], strict=False):
        strip += [slerp(first, second, k / (request.frames - 1)) for k in range(1, request.frames - 1)] + [second]
    labels = [label for label in classes for _ in strip]

    def generated(places: range) -> list[Tensor]:
        z = torch.stack([strip[place % len(strip)] for place in places])  # (B, c, h, w)
        chosen = torch.tensor(labels[places.start : places.stop])
        return [images_of(sampler.generator, sampler.vae, z, chosen, sampler.micro_batch, sampler.device, steps)]

    pieces = micro_batches(range(len(labels)), sampler.micro_batch)
    return labels, len(strip), (images for _, (images,) in map_across_ranks(pieces, generated, ranks))


def _class(asked: str, names: Sequence[str]) -> int:
    for same in (str, str.casefold):
        found = [label for label, name in enumerate(names) if same(name) == same(asked)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"Found {len(found)} classes named {asked!r}, expected one: say {' or '.join(map(str, found))}."
            )
    if asked.isdecimal():
        if int(asked) < len(names):
            return int(asked)
        raise UserError(f"Found class {asked}, expected a number below {len(names)}, the number of classes.")
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(asked.casefold(), folded, n=3, cutoff=0.5)
    near += [name for name in folded if asked and asked.casefold() in name and name not in near][:3]
    hint = f"did you mean {', '.join(folded[name] for name in near)}?" if near else f"such as {', '.join(names[:3])}."
    raise UserError(f"Found no class {asked!r}, expected a number below {len(names)} or a name; {hint}")


def _open_files(request: Request, labels: list[int], columns: int, stack: ExitStack) -> list[ImageFile]:
    """Open what is asked for; each takes its place when the stack is left without an error."""
    files: list[ImageFile] = []
    if request.grid is not None:
        files.append(GridFile(stack.enter_context(atomic_path(request.grid)), columns))
    if request.images is not None:
        files.append(PngFolder(stack.enter_context(atomic_path(request.images))))
    if request.npz is not None:
        files.append(NpzFile(stack.enter_context(atomic_path(request.npz)), labels))
    return files


def _is_numbered(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.isdecimal() and path.is_file()
