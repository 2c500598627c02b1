"""Write the study: numbers as JSON, maps as CSV for whoever draws their own figures, and ours as PNG."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from afm_pipe.params import Toy
from afm_pipe.runtime.files import write_json
from afm_pipe.study.toy.figures import draw_guidance, draw_maps, draw_sweep
from afm_pipe.study.toy.study import Study, measure

ROWS_PER_MAP = 512  # of the CSV files; all points are measured and drawn


def write_study(study: Study, toy: Toy, folder: Path) -> None:
    """Write everything into a new folder: all numbers in results.json, the few that DVC compares in metrics.json."""
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(study, toy)
    write_json(folder / "results.json", results)
    write_json(folder / "metrics.json", headline(results))
    every = max(1, len(study.noise) // ROWS_PER_MAP)
    noise = study.noise[::every].tolist()
    _write_csv(
        folder / "maps.csv",
        ("setting", "seed", "z", "x"),
        (
            (name, seed, f"{z:.5f}", f"{x:.5f}")
            for name, learned in study.maps.items()
            for seed, of_seed in enumerate(learned.x[:, ::every].tolist())
            for z, x in zip(noise, of_seed, strict=True)
        ),
    )
    _write_csv(
        folder / "guidance.csv",
        ("guidance", "seed", "class", "z", "x"),
        (
            (name, seed, label, f"{z:.5f}", f"{x:.5f}")
            for name, samples in study.guided.items()
            for seed, of_seed in enumerate(samples[:, :, ::every].tolist())
            for label, of_class in enumerate(of_seed)
            for z, x in zip(noise, of_class, strict=True)
        ),
    )
    draw_maps(study, results, toy, folder / "maps.png")
    draw_sweep(study, results, folder / "sweep.png")
    draw_guidance(study, toy, folder / "guidance.png")


def headline(results: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that tell studies apart at a glance; all of them would crowd out the runs' in DVC's tables."""
    compared = {
        name: {key: results["maps"][name][f"{key}_mean"] for key in ("w1", "rms", "spread")}
        for name in ("gan", "afm_1")
    }
    return compared | {"spread_ratio": results["spread_ratio"]}


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
