"""Files a report is built from, fabricated, and a page of it read back as a browser's parser would."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from afm_pipe.params import Params
from afm_pipe.reporting.page import write_report
from afm_pipe.runtime import paths

COMMITTED = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
RUNS = {"t4": {"seed": 0}, "t4-no-transport": {"transport": 0.0}}
CLASSES = [str(digit) for digit in range(9)] + ['"><b>&nine']  # a class name is a folder's name: anything
COLUMNS = [
    "update",
    "images",
    "epoch",
    "lr",
    "transport",
    "d_adversarial",
    "r1",
    "r2",
    "logit_centering",
    "g_adversarial",
]
COLUMNS += ["g_transport", "logit_gap", "d_accuracy", "transport_rms", "d_grad_norm", "g_grad_norm"]


def make_params(**runs: dict[str, Any]) -> Params:
    own = {"runs": runs or RUNS, "guided": {}, "imported": {}, "tables": {}}
    return Params.model_validate(COMMITTED | own)


def write_inputs(params: Params, rows: int = 40) -> None:
    """Write, under the working directory, every file the report reads."""
    for number, name in enumerate(params.runs):
        write(
            paths.metrics(name),
            {
                "fd_classifier_5k": 8.1234 + 300 * number,
                "kid_classifier_5k": 0.012345,
                "class_accuracy": 0.978 - 0.5 * number,
                "within_class_variance": 0.85,
                "copies": 0.0,
                "nearest_distance_ratio": 1.1,
                "protocol": {"samples": 5000, "seed": 1000, "features": {"classifier": "ab" * 32}, "device": "cpu"}
                | {"class_shares": "the data's"},
            },
        )
        write(
            paths.costs(name),
            {"machine": "2-core test machine", "device": "cpu", "threads": 2, "seconds": 155.1, "updates": 1250}
            | {"images": 80000, "images_per_second": 516.0, "updates_per_second": 8.06, "data_wait_share": 0.004}
            | {"checkpoint_share": 0.004, "peak_memory_gib": 0.9},
        )
        write(
            paths.model(name) / "config.json",
            {"generator_parameters": 1_234_567, "discriminator_parameters": 1_200_000},
        )
        write_curve(paths.curves(name), number, rows)
        write_picture(paths.samples(name) / "grid.png", number)
        write_picture(paths.samples(name) / "nearest.png", number + 10)
        write_picture(paths.samples(name) / "interpolation.png", number + 20)
    write(
        paths.REFERENCE / "summary.json",
        {"classifier_accuracy": 0.97, "fd_classifier_reconstruction": 3.14, "kid_classifier_reconstruction": 0.004}
        | {"images": 5000, "classes": CLASSES},
    )
    write(paths.AUTOENCODER / "training.json", {"reconstruction_mse": 0.0085})
    write_picture(paths.REFERENCE / "real.png", 20)
    write_picture(paths.REFERENCE / "reconstructed.png", 21)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_curve(path: Path, seed: int, rows: int, broken: int | None = None) -> None:
    noise = np.random.default_rng(seed).random((rows, len(COLUMNS)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in range(rows):
            values = dict(zip(COLUMNS, noise[row], strict=True))
            values |= {"update": row + 1, "images": 64 * (row + 1), "lr": 1e-3, "transport": 0.2 / (row + 1)}
            writer.writerow("nan" if row == broken else values[name] for name in COLUMNS)


def write_picture(path: Path, seed: int, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


class Page(HTMLParser):
    """What a test asks of a page: elements with their attributes, the text, and the rows of each table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text = ""
        self._table = self._part = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._table = dict(attrs)["id"] or ""
        if tag in ("thead", "tbody", "tfoot"):
            self._part = f"{self._table} {tag}"
        if tag == "tr":
            self.rows.setdefault(self._part, []).append([])
        if tag in ("td", "th"):
            self.rows[self._part][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._part = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._part and self.rows.get(self._part) and self.rows[self._part][-1]:
            self.rows[self._part][-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def built(params: Params) -> Page:
    write_report(params, paths.REPORT, paths.RENDERED)
    return Page((paths.REPORT / "index.html").read_text(encoding="utf-8"))
