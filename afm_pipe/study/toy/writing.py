"""Write the toy experiment: measurements as JSON, maps and samples as CSV, figures as PNG."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from afm_pipe.params import Toy
from afm_pipe.runtime.files import write_json
from afm_pipe.study.toy.experiment import Experiment, measure
from afm_pipe.study.toy.figures import draw_guidance, draw_maps, draw_sweep
from afm_pipe.study.toy.results import Strong, ToyResults

ROWS_PER_MAP = 512  # of the CSV files; measurements and figures use all points


def write_experiment(experiment: Experiment, strong: Strong | None, toy: Toy, folder: Path) -> None:
    """Write everything into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(experiment, toy).model_copy(update={"strong": strong})
    write_json(folder / "results.json", results.model_dump(mode="json", exclude_none=True))
    write_json(folder / "metrics.json", headline(results))
    every = max(1, len(experiment.noise) // ROWS_PER_MAP)
    noise = experiment.noise[::every].tolist()
    maps = (
        f"{name},{seed},{z:.5f},{x:.5f}"
        for name, each in experiment.maps.items()
        for seed, of_seed in enumerate(each.x[:, ::every].tolist())
        for z, x in zip(noise, of_seed, strict=True)
    )
    guided = (
        f"{name},{seed},{label},{z:.5f},{x:.5f}"
        for name, samples in experiment.guided.items()
        for seed, of_seed in enumerate(samples[:, :, ::every].tolist())
        for label, of_class in enumerate(of_seed)
        for z, x in zip(noise, of_class, strict=True)
    )
    _write_lines(folder / "maps.csv", "setting,seed,z,x", maps)
    _write_lines(folder / "guidance.csv", "guidance,seed,class,z,x", guided)
    draw_maps(experiment, results, toy, folder / "maps.png")
    draw_sweep(experiment, results, folder / "sweep.png")
    draw_guidance(experiment, toy, folder / "guidance.png")


def headline(results: ToyResults) -> dict[str, Any]:
    """Return the few numbers that DVC compares; more would crowd out the metrics of runs."""
    numbers = {name: results.maps[name].model_dump() for name in ("gan", "afm_1")}
    compared = {name: {key: each[f"{key}_mean"] for key in ("w1", "rms", "spread")} for name, each in numbers.items()}
    return compared | {"spread_ratio": results.spread_ratio}


def _write_lines(path: Path, header: str, lines: Iterable[str]) -> None:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
