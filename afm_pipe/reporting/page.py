"""Write the report: one page that stands alone, and its tables and pictures as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from afm_pipe import paths
from afm_pipe.params import Params
from afm_pipe.reporting import curves, pictures, tables, titles
from afm_pipe.reporting.inputs import Inputs, RunRecord, read_inputs, stage_of
from afm_pipe.reporting.one_dimension import read_one_dimension
from afm_pipe.reporting.pictures import Picture
from afm_pipe.reporting.plots import PLOTS_CSS
from afm_pipe.reporting.printing import write_files
from afm_pipe.reporting.sections import sections

PICTURE_BYTES = 6 * 2**20  # of all pictures together, before base64 adds a third: the page stays under 10 MiB
IMAGENET_IMAGES = 1_281_167
DATA_TITLES = {"mnist5k": "MNIST-5k (handwritten digits)"}


class Fact(NamedTuple):
    """A figure of the summary, the words under it, and the file it was read from."""

    title: str
    value: str
    words: str
    source: Path


def write_report(params: Params, folder: Path) -> None:
    """Write the report of exactly the runs that params name into `folder`, from the files of the other stages.

    Reads relative to the working directory. Raises UserError naming file and stage when one is missing.
    The same inputs give the same bytes.
    """
    inputs = read_inputs(params)
    own = (tables.run_table(inputs), tables.cost_table(inputs))
    parts = sections(inputs)
    one_dimension = read_one_dimension()
    trained = [record for record in inputs.runs if record.settings]  # they come first; the others have no curves
    panels = curves.draw_panels(trained)
    grids, nearest = _pictures(inputs)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            data=_data_title(params),
            shape=_shape(params),
            pixelated=params.data.image_size <= 64,
            inputs=inputs,
            facts=_facts(inputs),
            scale=_scale_sentence(inputs),
            run_table=own[0],
            cost_table=own[1],
            sections=parts,
            up="../",
            here="",
            runs="runs/",
            one_dimension=one_dimension,
            panels=panels,
            legend=[(record.name, Markup(curves.legend_key(index))) for index, record in enumerate(trained)],
            css=Markup(f"{curves.palette_css()}\n{curves.PANEL_CSS}\n{PLOTS_CSS}"),
            grids=grids,
            nearest=nearest,
            metrics=[(column.title, column.meaning) for column in own[0].columns if titles.metric(column.key).meaning],
            protocol=_protocol(inputs.runs),
            resolved={record.name: _yaml(_settings(params, record)) for record in inputs.runs},
            measured={record.name: _yaml(record.metrics | {"protocol": record.protocol}) for record in inputs.runs},
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page, encoding="utf-8")
    of_sections = [table for part in parts for table in (*part.tables, *part.published)]
    for table in (*own, *([one_dimension.table] if one_dimension else []), *of_sections):
        write_files(table, folder)
    (folder / "curves.svg").write_text(curves.draw_sheet(panels, [run.name for run in trained]), encoding="utf-8")
    pictures.draw_sheet(_tiles(inputs), folder / "samples.png")


def _pictures(inputs: Inputs) -> tuple[list[Picture], list[Picture]]:
    """Return the grids (real, reconstructed, one per run) and the nearest-neighbour pictures, ready for the page."""
    share = PICTURE_BYTES // (2 + 2 * len(inputs.runs))
    rows = f"one row per class: {_classes(inputs)}"
    grids = [
        pictures.inline(paths.REFERENCE / "real.png", "reference", f"Real images, {rows}", "Real images", share),
        pictures.inline(
            paths.REFERENCE / "reconstructed.png",
            "reference",
            f"The same real images after the autoencoder, {rows}",
            "The same, reconstructed by the autoencoder",
            share,
        ),
    ]
    nearest = []
    for record in inputs.runs:
        name, stage = record.name, stage_of(inputs.params, "sample", record.name)
        alt = f"Samples of run {name}, {rows}"
        grids.append(pictures.inline(paths.samples(name) / "grid.png", stage, alt, f"Samples of {name}", share))
        alt = f"Samples of run {name}, each above the training images nearest to it in pixels"
        stage = stage_of(inputs.params, "evaluate", name)
        nearest.append(pictures.inline(paths.samples(name) / "nearest.png", stage, alt, name, share))
    return grids, nearest


def _tiles(inputs: Inputs) -> list[tuple[str, Any]]:
    real = [(title, paths.REFERENCE / f"{title}.png", "reference") for title in ("real", "reconstructed")]
    runs = [
        (run.name, paths.samples(run.name) / "grid.png", stage_of(inputs.params, "sample", run.name))
        for run in inputs.runs
    ]
    return [(title, pictures.open_png(path, stage)) for title, path, stage in real + runs]


def _facts(inputs: Inputs) -> list[Fact]:
    """Return the figures that answer at a glance: how good, how right, how original, at what cost."""
    facts = []
    key, best = _best(inputs.runs)
    if best is not None:
        floor = inputs.summary.floor(titles.base_key(key))
        words = f"{titles.metric(key).title}, run {best.name}, the lowest"
        words += f"; reconstructed real images have {titles.number(floor)}" if floor is not None else ""
        facts.append(Fact("Best distance", titles.metric_text(key, best.metrics[key]), words, paths.metrics(best.name)))
    shown = best or inputs.runs[0]
    source = paths.metrics(shown.name)
    if shown.metrics.get("class_accuracy") is not None:
        words = f"of {shown.name}'s samples show the class asked for"
        accuracy = inputs.summary.classifier_accuracy
        words += f"; the classifier is right on {titles.percent(accuracy)} of held-out real images" if accuracy else ""
        facts.append(Fact("Right class", titles.percent(shown.metrics["class_accuracy"]), words, source))
    if shown.metrics.get("copies") is not None:
        words = f"of {shown.name}'s samples are nearly a training image; new real images would give about 0.1 %"
        facts.append(Fact("Copies", titles.percent(shown.metrics["copies"]), words, source))
    cost = shown.cost
    if cost is not None:
        words = f"for {titles.number(cost.images)} images, {titles.number(cost.images_per_second)} a second, "
        words += cost.machine
        facts.append(Fact(f"Training {shown.name}", titles.duration(cost.seconds), words, paths.costs(shown.name)))
    return facts


def _best(runs: Sequence[RunRecord]) -> tuple[str, RunRecord | None]:
    """Return the run of the lowest distance, in the first distance that most runs have; None without any."""
    values: dict[str, dict[str, float]] = {}
    for run in runs:
        for key, value in run.metrics.items():
            if value is not None and titles.is_distance(key):
                values.setdefault(key, {})[run.name] = value
    if not values:
        return "", None
    key = max(titles.in_order(values), key=lambda key: len(values[key]))
    lowest = min(values[key], key=lambda name: values[key][name])
    return key, next(run for run in runs if run.name == lowest)


def _scale_sentence(inputs: Inputs) -> str:
    """Say in what the numbers differ from the paper's protocol, and that they are therefore not comparable with it."""
    params = inputs.params
    departures = []
    if inputs.summary.images < IMAGENET_IMAGES:
        departures.append(f"{titles.number(inputs.summary.images)} training images instead of {IMAGENET_IMAGES:,}")
    if params.data.image_size != 256:
        departures.append(f"{params.data.image_size} pixels instead of 256")
    if params.evaluate.samples < 50_000:
        departures.append(f"{titles.number(params.evaluate.samples)} samples instead of 50,000")
    if "inception_legacy_tensorflow" not in params.evaluate.features:
        departures.append(f"{' and '.join(params.evaluate.features)} features instead of the paper's Inception")
    if departures:
        return f"This is small scale and not comparable with the paper's ImageNet numbers: {', '.join(departures)}."
    return "Compare with the paper only if these images are ImageNet's and the reference is its full training set."


def _protocol(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Return how the metrics were measured: what all runs share in full, what differs by name only."""
    flat = [_flat(run.protocol) for run in runs]
    keys = list(dict.fromkeys(key for protocol in flat for key in protocol))
    return [
        (key, str(flat[0].get(key)) if len({str(f.get(key)) for f in flat}) == 1 else "differs: see each run below")
        for key in keys
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, part in value.items():
        name = prefix + key.replace("_", " ")
        flat |= _flat(part, f"{name}: ") if isinstance(part, dict) else {name: part}
    return flat


def _data_title(params: Params) -> str:
    return DATA_TITLES.get(params.data.source, f"images of {params.data.root}")


def _shape(params: Params) -> str:
    colour = "grey" if params.data.channels == 1 else "RGB"
    return f"{params.data.image_size} × {params.data.image_size} {colour}"


def _classes(inputs: Inputs, most: int = 10) -> str:
    shown = inputs.summary.classes[: min(most, inputs.params.sample.classes)]
    more = min(inputs.params.sample.classes, len(inputs.summary.classes)) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _settings(params: Params, record: RunRecord) -> dict[str, Any]:
    """Return a run's resolved settings; of an imported model, what params say of it and what it turned out to be."""
    if record.settings is not None:
        return record.settings.model_dump(mode="json")
    return {"imported": params.imported[record.name].model_dump(mode="json"), "model": record.config.model}


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # class names and paths are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
