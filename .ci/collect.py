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
from base64 import b64decode, b64encode
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from afm_pipe.runtime.files import atomic_path

PATTERNS = (
    *(
        f"results/{name}/**/*"
        for name in ("costs", "curves", "events", "metrics", "tables", "toy", "rendered", "report")
    ),
    *("params.yaml", "reference/summary.json", "models/*/config.json"),
    *("reference/*.png", "samples/*/*.png"),
)
EMBEDDED = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]{2000,})")
LINK = re.compile(r'\b(href|src)="((?!data:|https?:|#)[^"]+)"')


def collect(clone: Path, to: Path, grid: str) -> None:
    """Replace the folder `to` by the results of a clone, whole or not at all."""
    with atomic_path(to) as folder:
        _copy(clone, folder, to, grid)


def _copy(clone: Path, folder: Path, to: Path, grid: str) -> None:
    """Write the results into `folder`, with links for the place `to`."""
    copies: dict[str, Path] = {}  # by path in the clone: the path below `to`
    for path in (path for pattern in PATTERNS for path in sorted(clone.glob(pattern))):
        if path.is_dir() or path.name == ".gitignore":
            continue
        source = str(path.relative_to(clone))
        picture = path.suffix == ".png"
        name = Path(source.removeprefix("results/")).with_suffix(".jpg" if picture else path.suffix)
        copies[source] = name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if picture:
            (folder / name).write_bytes(_jpeg(path))
        else:
            shutil.copyfile(path, folder / name)
    with Image.open(clone / "samples" / grid / "grid.png") as image:
        image.convert("RGB").quantize(256).save(folder / "samples.png", optimize=True)
    for page in folder.rglob("*.html"):
        moved = partial(_moved, page=page.relative_to(folder), to=to, copies=copies)
        page.write_text(EMBEDDED.sub(_lighter, LINK.sub(moved, page.read_text("utf-8"))), "utf-8")
    head = subprocess.check_output(["git", "-C", clone, "rev-parse", "--short", "HEAD"], text=True)
    (folder / "COMMIT").write_text(head, "utf-8")


def _jpeg(picture: Path | BytesIO) -> bytes:
    written = BytesIO()
    with Image.open(picture) as image:
        image.convert("RGB").save(written, "JPEG", quality=85, optimize=True)
    return written.getvalue()


def _lighter(embedded: re.Match[str]) -> str:
    """Return a picture of a page as a JPEG."""
    return f"data:image/jpeg;base64,{b64encode(_jpeg(BytesIO(b64decode(embedded[1])))).decode()}"


def _moved(link: re.Match[str], page: Path, to: Path, copies: dict[str, Path]) -> str:
    """Return a link of a page of results/ in the clone, as it must be in the page's copy below `to`."""
    path, anchor, place = link[2].partition("#")
    target = os.path.normpath("results" / page.parent / path)
    moved = to / copies[target] if target in copies else target
    return f'{link[1]}="{os.path.relpath(moved, (to / page).parent)}{anchor}{place}"'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--grid", required=True, metavar="RUN")
    options = parser.parse_args()
    collect(options.clone, options.to, options.grid)
