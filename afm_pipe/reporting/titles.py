"""What numbers are called and how they are printed: the one place where a metric's key becomes words."""

import math
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

MISSING = "–"
Better = Literal["lower", "higher", "near 1", ""]


class Metric(NamedTuple):
    """How one metric reads: its title ({n}: the sample count), the better direction, plain words, whether a share."""

    title: str
    better: Better
    meaning: str
    share: bool = False


_FRECHET = "Fréchet distance between two Gaussians, one fitted to the features of samples, one to those of real images"
_KERNEL = "Unbiased kernel distance (cubic kernel, mean over random subsets) between the features of both"
_CLASSIFIER = (
    "of a small classifier trained on the same real images; not Inception's, so values compare within this page only"
)
_PRECISION = "Share of samples among the real images: within the ball of one that reaches to its third nearest other"
_RECALL = "Share of real images among the samples: within the ball of one that reaches to its third nearest other"
_METRICS = {  # in the order of the tables' columns
    "fid": Metric("FID{n}", "lower", f"{_FRECHET}; Inception features, TensorFlow's resizing (the common protocol)"),
    "kid": Metric("KID{n}", "lower", f"{_KERNEL}; Inception features, TensorFlow's resizing"),
    "sfid": Metric("sFID{n}", "lower", f"{_FRECHET}; spatial features of Inception, TensorFlow's resizing"),
    "inception_score": Metric("IS{n}", "higher", "Inception Score, the mean over parts of 5,000 in random order"),
    "precision": Metric("Precision{n}", "higher", f"{_PRECISION}; Inception features"),
    "recall": Metric("Recall{n}", "higher", f"{_RECALL}; Inception features"),
    "fid_clean": Metric("FID{n} (clean)", "lower", f"{_FRECHET}; Inception features, clean-fid's resizing"),
    "kid_clean": Metric("KID{n} (clean)", "lower", f"{_KERNEL}; Inception features, clean-fid's resizing"),
    "precision_clean": Metric("Precision{n} (clean)", "higher", f"{_PRECISION}; Inception, clean-fid's resizing"),
    "recall_clean": Metric("Recall{n} (clean)", "higher", f"{_RECALL}; Inception features, clean-fid's resizing"),
    "fd_classifier": Metric("FD{n} (classifier)", "lower", f"{_FRECHET}; features {_CLASSIFIER}"),
    "kid_classifier": Metric("KID{n} (classifier)", "lower", f"{_KERNEL}; features {_CLASSIFIER}"),
    "precision_classifier": Metric("Precision{n} (classifier)", "higher", f"{_PRECISION}; features {_CLASSIFIER}"),
    "recall_classifier": Metric("Recall{n} (classifier)", "higher", f"{_RECALL}; features {_CLASSIFIER}"),
    "class_accuracy": Metric(
        "Right class", "higher", "Share of samples that the classifier puts in the class asked for", share=True
    ),
    "within_class_variance": Metric(
        "Within-class variance",
        "near 1",
        "Variance of the pixels within a class, averaged over classes, samples over real images; well below 1: too "
        "little variety",
    ),
    "within_class_variance_features": Metric(
        "... of features",
        "near 1",
        "The same for the features of the network distances are taken in; odd images weigh more here",
    ),
    "copies": Metric(
        "Copies",
        "lower",
        "Share of samples as near, in pixels, to a training image as only one in a thousand of those is to another; "
        "new real images would give about 0.1 %",
        share=True,
    ),
    "nearest_distance_ratio": Metric(
        "Nearest distance",
        "near 1",
        "Median distance in pixels from a sample to its nearest training image, over that from a real image to its "
        "nearest other one; well below 1: memorised",
    ),
}
_DISTANCES = ("fid", "fid_clean", "sfid", "fd_")
_SAMPLES = re.compile(r"^(?P<base>.+?)_(?P<count>\d+k?)$")


def base_key(key: str) -> str:
    """Return a metric's key without its sample count: fid_5k -> fid."""
    match = _SAMPLES.match(key)
    return match["base"] if match else key


def metric(key: str) -> Metric:
    """Return the title and direction of a metric; only distances in Inception's features are called FID."""
    match = _SAMPLES.match(key)
    base = base_key(key)
    found = _METRICS.get(base)
    if found is None and base.startswith(("fd_", "kid_")):
        kind, features = base.split("_", 1)
        words, short = (_FRECHET, "FD") if kind == "fd" else (_KERNEL, "KID")
        found = Metric(f"{short}{{n}} ({features})", "lower", f"{words}; features of {features}, not Inception's")
    if found is None and base.startswith(("precision_", "recall_")):
        kind, features = base.split("_", 1)
        words = _PRECISION if kind == "precision" else _RECALL
        found = Metric(f"{kind.capitalize()}{{n}} ({features})", "higher", f"{words}; features of {features}")
    found = found or Metric(f"{base}{{n}}", "", "")
    return found._replace(title=found.title.replace("{n}", f"-{match['count']}" if match else ""))


def in_order(keys: Iterable[str]) -> list[str]:
    """Return metric keys in the order of the tables' columns; unknown ones last, by name."""
    known = list(_METRICS)
    return sorted(set(keys), key=lambda key: (known.index(b) if (b := base_key(key)) in known else len(known), key))


def is_distance(key: str) -> bool:
    """Tell whether a metric is a Fréchet distance, by which runs may be compared."""
    return base_key(key).startswith(_DISTANCES)


def number(value: float | int | None, digits: int = 3) -> str:
    """Print a number with `digits` significant digits: 8.10, 1,250, 1.2e-5; a missing one as a dash."""
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -4 or exponent >= 6:
        return f"{rounded / 10**exponent:.{digits - 1}f}e{exponent}"
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def percent(value: float | None) -> str:
    """Print a share as percent with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def metric_text(key: str, value: float | None) -> str:
    """Print a metric's value the way its kind is read."""
    return percent(value) if metric(key).share else number(value)


def duration(seconds: float) -> str:
    """Print a time in the unit a person would choose."""
    for unit, size, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < until:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 86400)} days"


def millions(count: int) -> str:
    """Print a number of parameters in millions."""
    return f"{number(count / 1e6)} M"
