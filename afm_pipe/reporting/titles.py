"""Titles of metrics and formats of numbers."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

MISSING = "–"
ROUNDING = 1e-12  # smaller values are what rounding leaves of zero
Better = Literal["lower", "higher", "near 1", "near 0", ""]


class Metric(NamedTuple):
    """A metric's title, its better direction, an explanation, and whether it is a share."""

    title: str
    better: Better
    meaning: str
    share: bool = False


_FRECHET = "Fréchet distance between two Gaussians, one fitted to the features of samples, one to those of real images"
_METRICS = {  # metrics that are measured in a feature space, by the first part of their key
    "fid": Metric("FID", "lower", _FRECHET),
    "fd": Metric("FD", "lower", _FRECHET),
    "kid": Metric(
        "KID", "lower", "Unbiased kernel distance (cubic kernel, mean over random subsets) between the features of both"
    ),
    "sw": Metric(
        "SW",
        "lower",
        "Sliced Wasserstein distance, 3 D times the mean squared 1-D distance over random directions of D features, "
        "without a Gaussian; in Inception's features it is MIND",
    ),
    "precision": Metric(
        "Precision",
        "higher",
        "Share of samples in the ball around any real image that reaches its third nearest neighbor",
    ),
    "recall": Metric(
        "Recall", "higher", "Share of real images in the ball around any sample that reaches its third nearest neighbor"
    ),
}
_SPACES = {
    "": "Inception features, TensorFlow's resizing (the common protocol)",
    "clean": "Inception features, clean-fid's resizing",
    "classifier": (
        "features of a small classifier trained on the same real images; not Inception's, so values compare within "
        "this page only"
    ),
}
_RELATIVE = {  # a metric beside that of held-out real images, by the first part of its key
    "ratio": Metric(
        "ratio", "near 1", "relative to that of held-out real images, as many and in the same class shares: 1 is real"
    ),
    "difference": Metric(
        "difference", "near 0", "minus that of held-out real images, as many and in the same class shares: 0 is real"
    ),
}
_OTHERS = {
    "sfid": Metric("sFID", "lower", f"{_FRECHET}; spatial features of Inception, TensorFlow's resizing"),
    "inception_score": Metric("IS", "higher", "Inception Score, the mean over splits of 5,000 in random order"),
    "class_accuracy": Metric(
        "Class accuracy", "higher", "Share of samples that the classifier assigns to their class", share=True
    ),
    "within_class_variance": Metric(
        "Within-class variance",
        "near 1",
        "Pixel variance within a class, averaged over classes, of samples relative to real images; well below 1: too "
        "little variety",
    ),
    "within_class_variance_features": Metric(
        "Within-class variance (features)",
        "near 1",
        "The same for the features that distances are measured in; unusual images weigh more",
    ),
    "copies": Metric(
        "Copies",
        "lower",
        "Share of samples as near, in pixels, to a training image as only one training image in a thousand is to "
        "another; new real images would give about 0.1 %",
        share=True,
    ),
    "nearest_distance_ratio": Metric(
        "Nearest distance",
        "near 1",
        "Median pixel distance from a sample to its nearest training image, relative to that from a real image to its "
        "nearest other one; well below 1: memorized",
    ),
}
_SPACE_OF = {"inception_legacy_tensorflow": "", "inception_clean": "clean"}  # other networks: their own names
_ALSO_OF = {  # metrics of a network besides those of its feature space
    "classifier": ("class_accuracy", "within_class_variance_features"),
    "inception_legacy_tensorflow": ("inception_score",),
    "inception_spatial": ("sfid",),
}
_ORDER = (
    *("fid", "kid", "sw", "sfid", "inception_score", "precision", "recall"),
    *("ratio_fid", "difference_kid", "ratio_sw", "ratio_sfid"),
    *("fid_clean", "kid_clean", "sw_clean", "precision_clean", "recall_clean"),
    *("ratio_fid_clean", "difference_kid_clean", "ratio_sw_clean"),
    *("fd_classifier", "kid_classifier", "sw_classifier", "precision_classifier", "recall_classifier"),
    *("ratio_fd_classifier", "difference_kid_classifier", "ratio_sw_classifier"),
    *("class_accuracy", "within_class_variance", "within_class_variance_features", "copies", "nearest_distance_ratio"),
)
_SAMPLES = re.compile(r"^(?P<base>.+?)_(?P<count>\d+k?)$")


def base_key(key: str) -> str:
    """Return a metric's key without its sample count: fid_5k -> fid."""
    match = _SAMPLES.match(key)
    return match["base"] if match else key


def metric(key: str) -> Metric:
    """Return the words for a metric; a Fréchet distance in features that are not Inception's is never called FID."""
    first, _, rest = key.partition("_")
    if first in _RELATIVE:
        of, kind = metric(rest), _RELATIVE[first]
        title = of.title.replace("-", f" {kind.title}-", 1) if _SAMPLES.match(rest) else f"{of.title} {kind.title}"
        return kind._replace(title=title, meaning=f"{of.title} {kind.meaning}")
    match, base = _SAMPLES.match(key), base_key(key)
    family, _, space = base.partition("_")
    found, suffix = _OTHERS.get(base, Metric(base, "", "")), ""
    if base not in _OTHERS and family in _METRICS:
        found, suffix = _METRICS[family], f" ({space})" if space else ""
        features = _SPACES.get(space, f"features of {space}, not Inception's")
        found = found._replace(meaning=f"{found.meaning}; {features}")
    count = f"-{match['count']}" if match else ""
    return found._replace(title=f"{found.title}{count}{suffix}")


def in_order(keys: Iterable[str]) -> list[str]:
    """Return metric keys in the order of the tables' columns; unknown ones last, by name."""
    places = {base: place for place, base in enumerate(_ORDER)}
    return sorted(set(keys), key=lambda key: (places.get(base_key(key), len(places)), key))


def is_distance(key: str) -> bool:
    """Return whether a metric is a Fréchet distance; these compare runs."""
    return base_key(key).startswith(("fid", "sfid", "fd_"))


def distance_in(network: str) -> str:
    """Return the key of the Fréchet distance in the features of a network, without a sample count."""
    space = _SPACE_OF.get(network, network)
    return f"fd_{space}" if space == network else "_".join(filter(None, ("fid", space)))


def is_of_network(key: str, network: str) -> bool:
    """Return whether a metric is measured with a feature network."""
    base = base_key(key).removeprefix("ratio_").removeprefix("difference_")
    family, _, space = base.partition("_")
    of_space = family in _METRICS and space == _SPACE_OF.get(network, network)
    return of_space or base in _ALSO_OF.get(network, ())


def number(value: float | int | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits: 8.10, 1,250, 1.2e-5; a missing one as a dash."""
    if value is None:
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    rounded = float(f"{value:.{digits}g}") if abs(value) > ROUNDING else 0.0
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -4 or exponent >= 6:
        return f"{rounded / 10**exponent:.{digits - 1}f}e{exponent}"
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def percent(value: float | None) -> str:
    """Format a share as a percentage with one decimal."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def metric_text(key: str, value: float | None) -> str:
    """Format a metric's value."""
    return percent(value) if metric(key).share else number(value)


def class_shares(protocols: Iterable[Mapping[str, Any]]) -> str:
    """Return how the classes of samples, and of the real images, were shared, or nothing where that is not recorded."""
    found = sorted({str(shares) for protocol in protocols if (shares := protocol.get("class_shares"))})
    return f" in {' or '.join(found)} class shares" if found else ""


def duration(seconds: float) -> str:
    """Format a time in the unit that a person would choose."""
    for unit, size, until in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < until:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 86400)} days"


def millions(count: int) -> str:
    """Format a number of parameters in millions."""
    return f"{number(count / 1e6)} M"
