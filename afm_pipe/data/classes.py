"""The rule by which classes are the same, wherever a model meets data, a classifier, a reference or another model.

Labels are positions, so names decide: equal names in equal order. One other mapping is known: the names that imported
weights of ImageNet get (torchvision's) stand, in order, for the 1,000 sorted WordNet ids that name ImageNet's folders.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afm_pipe.runtime.environment import env_rank
from afm_pipe.runtime.errors import UserError

SHOWN = 60  # characters of a name in a message
IMAGENET = {  # some of ImageNet's sorted WordNet ids by position
    **{0: "n01440764", 207: "n02099601", 281: "n02123045"},
    **{388: "n02510455", 985: "n11939491", 999: "n15075141"},
}


def require_same_classes(
    found: Any, where: Path | str, expected: Sequence[str], of: Path | str, count: int | None = None
) -> None:
    """Raise UserError naming the first difference unless `found` are the class names `expected`, in order.

    `where` and `of` say whose classes they are. Files of version 0.1 may hold no names (`found` is None): then only
    the `count` of classes is compared, where known, and a line says so.
    """
    names = [str(name) for name in found] if isinstance(found, list | tuple) else []
    if found is None and count in (None, len(expected)):
        if env_rank() == 0:
            print(f"Not checked: whether the classes of {where}, which holds no names, are those of {of}.")
        return
    if names == list(expected) or _is_imagenet(names, expected) or _is_imagenet(expected, names):
        return
    number = len(names) if count is None else count
    remedy = (
        "use data and models of the same classes in the same order; imported.NAME.classes names those of imported "
        "weights."
    )
    if found is None:
        raise UserError(f"Found {number} classes in {where}, expected {len(expected)} as in {of}: {remedy}")
    at = next((i for i, pair in enumerate(zip(names, expected, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(names), len(expected)) if at is None else at
    like, show = "", repr
    if set(names) == set(expected):
        like = ", the same names in another order"
    elif _composed(names) == _composed(expected):  # macOS decomposes accents, and the names look equal
        like, show = ", the same names in another Unicode form", ascii
    found_name, expected_name = (show(each[at])[:SHOWN] if at < len(each) else "nothing" for each in (names, expected))
    raise UserError(
        f"Found {found_name} as class {at} of {len(names)} in {where}{like}, expected {expected_name} of "
        f"{len(expected)} as in {of}: {remedy}"
    )


def _composed(names: Sequence[str]) -> list[str]:
    return sorted(unicodedata.normalize("NFC", name) for name in names)


def _is_imagenet(names: Sequence[str], folders: Sequence[str]) -> bool:
    """Return whether `names` are torchvision's of ImageNet, and `folders` the sorted WordNet ids."""
    if len(names) != 1000 or len(folders) != 1000 or list(folders) != sorted(set(folders)):
        return False
    if not all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return False
    return all(folders[at] == folder for at, folder in IMAGENET.items()) and list(names) == imagenet_names()


def imagenet_names() -> list[str]:
    """Return torchvision's names of ImageNet's classes."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
