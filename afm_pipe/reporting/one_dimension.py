"""The report's section on the 1-D toy experiment: its figures, its numbers, and what they show."""

import statistics
from pathlib import Path
from typing import NamedTuple

from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import read_output
from afm_pipe.reporting.pictures import Picture, inline
from afm_pipe.reporting.table import Cell, Column, Table
from afm_pipe.runtime import paths
from afm_pipe.study.toy.results import MapResults, OwnScale, Strong, StrongClaim, StrongResults, ToyResults

MAX_BYTES = 400_000  # of one figure inside the page
RESULTS = paths.TOY / "results.json"
_METHODS = {"gan": "GAN", "flow": "Flow matching", "afm": "Adversarial flow"}
_MEASURES = (
    ("w1", "W1 to the data", "Mean distance between quantiles of samples and data (lower is better)"),
    ("rms", "To the optimal map", "RMS of G(z) minus the optimal map, which is the data's quantile function"),
    ("spread", "Seed to seed", "RMS distance between the maps of two seeds; 0 if every seed learns the same map"),
    ("move", "Transport distance", "RMS of G(z) - z; 0 for a generator that returns its noise"),
)


class Drawing(NamedTuple):
    """A figure with its title and the file of its points."""

    title: str
    image: Picture
    points: Path


class OneDimension(NamedTuple):
    """The section, ready for the page."""

    finding: str
    scale: str
    pictures: tuple[Drawing, ...]
    table: Table
    strong: Table | None


def read_one_dimension() -> OneDimension | None:
    """Read the 1-D toy experiment; None if it was not run. Raises UserError when its files are damaged."""
    if not RESULTS.is_file():
        return None
    results = read_output(ToyResults, RESULTS, "toy")
    maps = sorted(results.maps.items(), key=lambda item: _order(item[1]))
    strong = _strong_table()
    return OneDimension(_finding(results), _scale(results.scale), _drawings(results), _table(results, maps), strong)


def _finding(results: ToyResults) -> str:
    gan, afm = results.maps["gan"], results.maps["afm_1"]
    ratio = results.spread_ratio
    compared = f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"
    return (
        f"Over {results.scale.seeds} seeds, the maps of two GANs differ by {titles.number(gan.spread_mean)} (RMS), "
        f"those of two one-step adversarial flow models by {titles.number(afm.spread_mean)}: {compared}. "
        f"Their samples are {titles.number(gan.w1_mean)} and {titles.number(afm.w1_mean)} from the data (W1)."
    )


def _scale(ours: OwnScale) -> str:
    paper = ours.paper
    return (
        f"Not the paper's size: width {ours.width} (the paper: {paper.width}), batch {ours.batch_size} "
        f"({paper.batch_size}), {ours.updates:,} alternating updates ({paper.updates:,}), and, to converge in them, "
        f"learning rate {ours.lr:g} ({paper.lr:g}) and penalty weight {ours.penalty_weight:g} "
        f"({paper.penalty_weight:g}). Models of several steps are in residual form, weights start with variance "
        "1 / fan-in, and the guiding classifier is the exact posterior instead of a trained one."
    )


def _drawings(results: ToyResults) -> tuple[Drawing, ...]:
    maps, seeds = results.maps.values(), results.scale.seeds
    spreads = "; ".join(f"{_name(each)} {each.spread_mean:.2f}" for each in maps)
    sweep = sorted((each for each in maps if each.steps == 1 and each.transport is not None), key=_weight)
    moves = ", ".join(f"{each.move_mean:.2f} at {each.transport:g}" for each in sweep)
    none, plain, flow, cfg = (
        results.guidance[name].outer_mean for name in ("none", "plain", "flow_based", "exact_cfg")
    )
    outer = (
        f"the outer classes lie at ±{none:.2f} without guidance, ±{plain:.2f} with plain, ±{flow:.2f} with flow-based "
        f"and ±{cfg:.2f} with classifier-free guidance"
    )
    return (
        _drawing(
            "Figure 1, ours: the learned maps.",
            "maps.png",
            f"Learned maps from noise to sample, one line for each of {seeds} seeds, over the optimal map. RMS "
            f"distance between the maps of two seeds: {spreads}.",
            "Each line is one seed; where lines coincide, seeds learned the same map. The paper's point: GANs learn "
            "another map with every seed, adversarial flow models the optimal one, in one step as in many; flow "
            "matching needs many steps to follow it.",
        ),
        _drawing(
            "Figure 2, ours: the weight of the transport loss.",
            "sweep.png",
            f"One-step maps of {seeds} seeds by transport weight, over the optimal map and the identity. Transport "
            f"distance by weight: {moves}.",
            "The paper's point: without the transport loss a GAN, with a small weight maps caught in local minima, "
            "with a large one a generator that returns its noise (the dotted line), and the optimal map in between.",
        ),
        _drawing(
            "Figure 3, ours: classifier guidance.",
            "guidance.png",
            f"Samples of four class-conditional settings by class: {outer}.",
            "The paper's point: where classes are separate, a classifier of clean samples has almost no gradient; at "
            "noise levels at which they overlap, its gradient pushes them apart, as classifier-free guidance does. "
            f"Here {outer}; each class is drawn to its own height, all seeds together.",
        ),
    )


def _drawing(title: str, name: str, alt: str, caption: str) -> Drawing:
    image = inline(paths.TOY / name, "toy", alt, caption, MAX_BYTES)
    return Drawing(title, image, paths.TOY / ("guidance.csv" if name == "guidance.png" else "maps.csv"))


def _table(results: ToyResults, maps: list[tuple[str, MapResults]]) -> Table:
    columns = (
        Column("method", "Method", numeric=False),
        Column("steps", "Steps", "From noise to sample"),
        Column("lambda_ot", "Transport weight", "λ_ot; flow matching has none"),
        *(Column(key, title, meaning) for key, title, meaning in _MEASURES),
    )
    caption = (
        f"1-D maps, from {RESULTS}: mean ± standard deviation over {results.scale.seeds} seeds. All are ours; the "
        "paper reports no values."
    )
    return Table("one_dimension", caption, columns, tuple(_row(name, numbers) for name, numbers in maps))


def _row(name: str, numbers: MapResults) -> tuple[Cell, ...]:
    method, weight = _METHODS[numbers.method], numbers.transport
    values = numbers.model_dump()
    cells = []
    for key, _, _ in _MEASURES:
        mean, std = values[f"{key}_mean"], values[f"{key}_std"]
        cells.append(Cell(f"{mean:.3f} ± {std:.3f}", mean, str(RESULTS), f"maps.{name}.{key}_mean"))
    words = titles.MISSING if weight is None else f"{weight:g}"
    return (Cell(method, method), Cell(str(numbers.steps), numbers.steps), Cell(words, weight), *cells)


def _name(numbers: MapResults) -> str:
    weight = f" at weight {numbers.transport:g}" if numbers.transport else ""
    return f"{_METHODS[numbers.method]}, {numbers.steps} step{'s' * (numbers.steps > 1)}{weight}"


def _order(numbers: MapResults) -> tuple[int, int, float]:
    return list(_METHODS).index(numbers.method), numbers.steps, _weight(numbers)


def _weight(numbers: MapResults) -> float:
    return numbers.transport or 0.0


def _strong_table() -> Table | None:
    """Return the table on ever stronger discriminators: of the larger study, or of this run; None without either."""
    path = paths.STUDY_STRONG_1D
    strong = read_output(Strong, path, "toy") if path.is_file() else read_output(ToyResults, RESULTS, "toy").strong
    if strong is None:
        return None
    columns = (
        Column("discriminator_updates", "D updates", "Updates of D to one of G"),
        Column("transport", "Transport", numeric=False),
        Column("normalization", "Normalization", "Of the adversarial gradient at G's output", numeric=False),
        Column("rms", "To the optimal map", "RMS of G(z) minus the optimal map"),
        Column("w1", "W1 to the data", "Mean distance between quantiles of samples and data (lower is better)"),
        Column("gap", "D's gap", "Fraction by which D's loss still falls against the final G; 0 at D's optimum"),
    )
    rows = tuple(
        (
            Cell(str(each.discriminator_updates), each.discriminator_updates),
            Cell("yes" if each.transport else "no", int(each.transport)),
            Cell("yes" if each.normalized else "no", int(each.normalized)),
            *(_over_seeds(values, str(path), f"settings.{i}.{key}") for key, values in _distances(each)),
            Cell(f"{each.discriminator_gap:.3f}", each.discriminator_gap, str(path)),
        )
        for i, each in enumerate(strong.settings)
    )
    verdicts = " ".join(f"{each.claim}: {each.outcome}{_ratio(each)}." for each in strong.claims)
    caption = (
        f"One-step maps against ever stronger discriminators, from {path}: {strong.pairs:,} updates of G, mean ± "
        f"standard deviation over {strong.seeds} seeds. {verdicts} Brackets: 95 % over seeds."
    )
    return Table("strong_discriminator_1d", caption, columns, rows)


def _distances(each: StrongResults) -> tuple[tuple[str, list[float | None]], ...]:
    return ("rms", each.rms), ("w1", each.w1)


def _over_seeds(values: list[float | None], source: str, key: str) -> Cell:
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return Cell(f"not finite on {len(values) - len(finite)} of {len(values)} seeds", None, source, key)
    mean = statistics.fmean(finite)
    return Cell(f"{mean:.3f} ± {statistics.stdev(finite):.3f}", mean, source, key)


def _ratio(claim: StrongClaim) -> str:
    if claim.ratio is None or claim.interval is None:
        return ""
    low, high = claim.interval
    return f" ({claim.ratio:.2f} times [{low:.2f}, {high:.2f}])"
