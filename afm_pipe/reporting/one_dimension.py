"""The report's section on the study on a line, if it was run: its figures, its numbers, and what they say."""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from afm_pipe.reporting import pictures, titles
from afm_pipe.reporting.inputs import typed
from afm_pipe.reporting.pictures import Picture
from afm_pipe.reporting.tables import Cell, Column, Table
from afm_pipe.runtime import paths

MAX_BYTES = 400_000  # of one figure inside the page
RESULTS = paths.TOY / "results.json"
_METHODS = {"gan": "GAN", "flow": "Flow matching", "afm": "Adversarial flow"}
_MEASURES = (
    ("w1", "W1 to the data", "Mean distance between quantiles of samples and data (lower is better)"),
    ("rms", "To the optimal map", "rms(G(z) - best z) over the noise; the best map is the data's quantile function"),
    ("spread", "Seed to seed", "RMS distance between the maps of two seeds; 0 if every training learns the same map"),
    ("move", "Way from noise", "rms(G(z) - z); 0 would be a generator that returns its noise"),
)


class MapNumbers(BaseModel):
    """What was measured of one setting, as mean and standard deviation over seeds."""

    model_config = ConfigDict(frozen=True)

    method: Literal["gan", "flow", "afm"]
    steps: int
    transport: float | None = None
    w1_mean: float
    w1_std: float
    rms_mean: float
    rms_std: float
    spread_mean: float
    spread_std: float
    move_mean: float
    move_std: float


class GuidanceNumbers(BaseModel):
    """Where guidance puts the samples: mean distance of outer and inner classes from 0, and their width."""

    model_config = ConfigDict(frozen=True)

    outer_mean: float
    inner_mean: float
    within_class_std_mean: float


class Scale(BaseModel):
    """The size of a study: updates are those of generator and discriminator together."""

    model_config = ConfigDict(frozen=True)

    width: int
    batch_size: int
    updates: int
    penalty_weight: float
    lr: float


class OurScale(Scale):
    """The size of ours, beside the paper's."""

    seeds: int
    points: int
    paper: Scale


class Results(BaseModel):
    """toy/results.json."""

    model_config = ConfigDict(frozen=True)

    maps: dict[str, MapNumbers]
    guidance: dict[str, GuidanceNumbers]
    scale: OurScale
    spread_ratio: float


class Drawing(NamedTuple):
    """A figure with its title and the file its points are in."""

    title: str
    image: Picture
    points: Path


class OneDimension(NamedTuple):
    """The section, ready for the page."""

    finding: str
    scale: str
    pictures: tuple[Drawing, ...]
    table: Table


def read_one_dimension() -> OneDimension | None:
    """Read the study on a line; None where it was not run. Raises UserError when its files are damaged."""
    if not RESULTS.is_file():
        return None
    results = typed(Results, RESULTS, "toy")
    return OneDimension(_finding(results), _scale(results.scale), _drawings(results), _table(results))


def _finding(results: Results) -> str:
    gan, afm = results.maps["gan"], results.maps["afm_1"]
    ratio = results.spread_ratio
    compared = f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"
    return (
        f"Over {results.scale.seeds} seeds, the maps of two GANs differ by {titles.number(gan.spread_mean)} (RMS), "
        f"those of two one-step adversarial flow models by {titles.number(afm.spread_mean)}: {compared}. "
        f"Their samples are {titles.number(gan.w1_mean)} and {titles.number(afm.w1_mean)} from the data (W1)."
    )


def _scale(ours: OurScale) -> str:
    paper = ours.paper
    return (
        f"Not the paper's size: width {ours.width} (the paper: {paper.width}), batch {ours.batch_size} "
        f"({paper.batch_size}), {ours.updates:,} alternating updates ({paper.updates:,}), and, to converge in them, "
        f"learning rate {ours.lr:g} ({paper.lr:g}) and penalty weight {ours.penalty_weight:g} "
        f"({paper.penalty_weight:g}). Models of several steps are in residual form, weights start with variance "
        "1 / fan-in, and the classifier that guides is the exact posterior instead of a trained one."
    )


def _drawings(results: Results) -> tuple[Drawing, ...]:
    maps, guided, seeds = results.maps, results.guidance, results.scale.seeds
    spreads = "; ".join(f"{_name(each)} {each.spread_mean:.2f}" for each in maps.values())
    sweep = sorted((each for each in maps.values() if each.steps == 1 and each.transport is not None), key=_weight)
    moves = ", ".join(f"{each.move_mean:.2f} at {each.transport:g}" for each in sweep)
    none, plain, flow, cfg = (guided[name].outer_mean for name in ("none", "plain", "flow_based", "exact_cfg"))
    outer = (
        f"the outer classes lie at ±{none:.2f} without guidance, ±{plain:.2f} with plain, ±{flow:.2f} with flow-based "
        f"and ±{cfg:.2f} with classifier-free guidance"
    )
    return (
        _drawing(
            "Figure 1, ours: the maps that are learned.",
            "maps.png",
            f"Learned maps from noise to sample, one line for each of {seeds} seeds, over the optimal map. RMS "
            f"distance between the maps of two seeds: {spreads}.",
            "Each line is one training; where lines lie on each other, trainings learned the same map. The paper's "
            "point: GANs learn another map with every seed, adversarial flow models the optimal one, in one step as in "
            "many; flow matching needs many steps to follow it.",
            "maps.csv",
        ),
        _drawing(
            "Figure 2, ours: the weight of the transport loss.",
            "sweep.png",
            f"One-step maps of {seeds} seeds by transport weight, over the optimal map and the identity. Way from "
            f"noise by weight: {moves}.",
            "The paper's point: without the transport loss a GAN, with little of it maps caught in local minima, with "
            "much of it a generator that returns its noise (the dotted line), and the optimal map in between.",
            "maps.csv",
        ),
        _drawing(
            "Figure 3, ours: classifier guidance.",
            "guidance.png",
            f"Samples of four class-conditional settings by class: {outer}.",
            "The paper's point: where classes are separate, a classifier of clean samples has next to nothing to say; "
            "at noise levels at which they overlap it pushes them apart, as classifier-free guidance does. "
            f"Here {outer}; each class is drawn to its own height, all seeds together.",
            "guidance.csv",
        ),
    )


def _drawing(title: str, name: str, alt: str, caption: str, points: str) -> Drawing:
    return Drawing(
        title, pictures.inline(pictures.read(paths.TOY / name, "toy"), alt, caption, MAX_BYTES), paths.TOY / points
    )


def _table(results: Results) -> Table:
    columns = (
        Column("method", "Method", numeric=False),
        Column("steps", "Steps", "From noise to sample"),
        Column("lambda_ot", "Transport weight", "λ_ot; flow matching has none"),
        *(Column(key, title, meaning) for key, title, meaning in _MEASURES),
    )
    caption = (
        f"Maps on a line, from {RESULTS}: mean ± standard deviation over {results.scale.seeds} seeds. All are ours; "
        "the paper gives no numbers."
    )
    order = list(_METHODS)
    rows = sorted(
        results.maps.items(),
        key=lambda item: (order.index(item[1].method), item[1].steps, _weight(item[1])),
    )
    return Table("one_dimension", caption, columns, tuple(_row(name, numbers) for name, numbers in rows))


def _row(name: str, numbers: MapNumbers) -> tuple[Cell, ...]:
    weight = titles.MISSING if numbers.transport is None else f"{numbers.transport:g}"
    method = _METHODS[numbers.method]
    cells = []
    for key, _, _ in _MEASURES:
        mean, std = (float(getattr(numbers, f"{key}_{kind}")) for kind in ("mean", "std"))
        cells.append(Cell(f"{mean:.3f} ± {std:.3f}", mean, str(RESULTS), f"maps.{name}.{key}_mean"))
    return (Cell(method, method), Cell(str(numbers.steps), numbers.steps), Cell(weight, numbers.transport), *cells)


def _name(numbers: MapNumbers) -> str:
    weight = f" at weight {numbers.transport:g}" if numbers.transport else ""
    return f"{_METHODS[numbers.method]}, {numbers.steps} step{'s' * (numbers.steps > 1)}{weight}"


def _weight(numbers: MapNumbers) -> float:
    return numbers.transport or 0.0
