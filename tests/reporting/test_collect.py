"""Results of another clone, copied into a folder of results/: their links lead somewhere."""

import re
import subprocess
import sys
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT

PAGE = """<a href="../../results/metrics/t4.json#fd">x</a> <a href="runs/t4.html">y</a> <a href="#top">z</a>
<img src="../../samples/t4/grid.png"> <img src="data:image/png;base64,AA"> <a href="../../models/t4/config.json">m</a>
<a href="../../benchmarks/results.json">b</a> <a href="https://arxiv.org/abs/2511.22475">p</a>"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    for name in ("results/metrics/t4.json", "models/t4/config.json", "params.yaml", "reference/summary.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "samples" / "t4").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "samples" / "t4" / "grid.png")
    (root / "results" / "report" / "runs").mkdir(parents=True)
    noise = BytesIO()
    Image.effect_noise((64, 64), 90).save(noise, "PNG")
    embedded = f'<img src="data:image/png;base64,{b64encode(noise.getvalue()).decode()}">'
    (root / "results" / "report" / "index.html").write_text(PAGE + embedded)
    (root / "results" / "report" / "runs" / "t4.html").write_text('<a href="../../../results/metrics/t4.json">x</a>')
    (root / "models" / "t4" / "generator.safetensors").write_text("large")
    git = ["git", "-C", root, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    return root


def test_pages_link_to_the_copies_and_to_files_of_this_checkout(clone: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (here / "results" / "photos" / "old").mkdir(parents=True)
    command = [sys.executable, ROOT / ".ci" / "collect.py", clone, "results/photos", "--grid", "t4"]
    subprocess.run(command, cwd=here, check=True)
    to = here / "results" / "photos"
    page = (to / "report" / "index.html").read_text()
    for link in (
        *('href="../metrics/t4.json#fd"', 'href="runs/t4.html"', 'href="#top"', 'src="../samples/t4/grid.jpg"'),
        *('src="data:image/png;base64,AA"', 'href="../models/t4/config.json"'),
        *('href="../../../benchmarks/results.json"', 'href="https://arxiv.org/abs/2511.22475"'),
    ):
        assert link in page
    (picture,) = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    with Image.open(BytesIO(b64decode(picture))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
    assert (to / "report" / "runs" / "t4.html").read_text() == '<a href="../../metrics/t4.json">x</a>'
    head = subprocess.check_output(["git", "-C", clone, "rev-parse", "--short", "HEAD"], text=True)
    assert (to / "COMMIT").read_text() == head
    (clone / "samples" / "t4" / "grid.png").unlink()
    assert subprocess.run(command, cwd=here, capture_output=True, check=False).returncode != 0
    found = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
    assert found == {
        *("metrics/t4.json", "models/t4/config.json", "params.yaml", "reference/summary.json", "samples.png", "COMMIT"),
        *("samples/t4/grid.jpg", "report/index.html", "report/runs/t4.html"),
    }
