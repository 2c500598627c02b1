"""Copy the results of another clone, in which a profile ran, into a folder of results/.

    python .ci/collect.py ../afm-pipe-photos results/photos64 --grid t2-guided

Copies results/, params, the reference's summary, the models' descriptions, and pictures as JPEG; the run's grid of
samples also becomes samples.png. Links of the pages point to the copies, or to the same file of this checkout.
"""

import argparse
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

from PIL import Image

PATTERNS = (
    *(
        f"results/{name}/**/*"
        for name in ("costs", "curves", "events", "metrics", "tables", "toy", "rendered", "report")
    ),
    *("params.yaml", "reference/summary.json", "models/*/config.json"),
    *("reference/*.png", "samples/*/*.png"),
)
LINK = re.compile(r'\b(href|src)="((?!data:|https?:|#)[^"]+)"')


def collect(clone: Path, to: Path, grid: str) -> None:
    """Replace the folder `to` by the results of a clone."""
    shutil.rmtree(to, ignore_errors=True)
    copies: dict[str, Path] = {}  # by path in the clone
    for path in (path for pattern in PATTERNS for path in sorted(clone.glob(pattern))):
        if path.is_dir() or path.name == ".gitignore":
            continue
        source = str(path.relative_to(clone))
        copy = copies[source] = to / source.removeprefix("results/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            copy = copies[source] = copy.with_suffix(".jpg")
            with Image.open(path) as image:
                image.convert("RGB").save(copy, quality=85)
        else:
            shutil.copyfile(path, copy)
    with Image.open(clone / "samples" / grid / "grid.png") as image:
        image.save(to / "samples.png", optimize=True)
    for page in to.rglob("*.html"):
        moved = partial(_moved, here="results" / page.relative_to(to), page=page, copies=copies)
        page.write_text(LINK.sub(moved, page.read_text("utf-8")), "utf-8")
    head = subprocess.check_output(["git", "-C", clone, "rev-parse", "--short", "HEAD"], text=True)
    (to / "COMMIT").write_text(head, "utf-8")


def _moved(link: re.Match[str], here: Path, page: Path, copies: dict[str, Path]) -> str:
    """Return a link of a page that stood at `here` in the clone, as it must be in the copy."""
    path, anchor, place = link[2].partition("#")
    target = os.path.normpath(here.parent / path)
    return f'{link[1]}="{os.path.relpath(copies.get(target, target), page.parent)}{anchor}{place}"'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--grid", required=True, metavar="RUN")
    options = parser.parse_args()
    collect(options.clone, options.to, options.grid)
