"""Print the installed versions of all that afm-pipe and its extras need, as pip constraints."""

import platform
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(name: str, extras: set[str], found: dict[str, str], seen: set[tuple[str, str]]) -> dict[str, str]:
    """Add to `found` the versions of the installed distributions that `name` with `extras` needs, itself excluded."""
    for text in distribution(name).requires or ():
        needed = Requirement(text)
        key = canonicalize_name(needed.name)
        wanted = any(needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        news = {(key, extra) for extra in ("", *needed.extras)} - seen
        if not wanted or not news:
            continue
        try:
            version = distribution(key).version
        except PackageNotFoundError:
            continue  # of an extra that is not installed
        found[key] = version.partition("+")[0]  # the CPU and the CUDA build of a release have one version
        seen |= news
        closure(key, needed.extras, found, seen)
    return found


if __name__ == "__main__":
    print(
        f"# The versions that the tests pass on, with Python {platform.python_version()}; `make lock` writes this file."
    )
    print("# They are constraints: what a platform does not need, such as nvidia-* on macOS, is not installed.")
    for name, version in sorted(closure("afm-pipe", {"dev", "features"}, {}, set()).items()):
        print(f"{name}=={version}")
