"""Write the report: one page that stands alone, and its tables and pictures as files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from afm_pipe.params import Params
from afm_pipe.reporting import curves, gallery, pictures, titles
from afm_pipe.reporting.inputs import Inputs, RunRecord, read_inputs
from afm_pipe.reporting.one_dimension import read_one_dimension
from afm_pipe.reporting.plots import PLOTS_CSS
from afm_pipe.reporting.printing import write_files
from afm_pipe.reporting.sections import sections
from afm_pipe.reporting.status import code_line
from afm_pipe.reporting.summary import facts
from afm_pipe.reporting.tables import cost_table, measured_table, run_table
from afm_pipe.runtime import paths

RUN_PICTURE_BYTES = 2**20  # of each of the three pictures of a run's own page
IMAGENET_IMAGES = 1_281_167
DATA_TITLES = {"mnist5k": "MNIST-5k (handwritten digits)"}


def write_report(params: Params, folder: Path, rendered: Path) -> None:
    """Write the pages and pictures of the runs in params into `folder`, the tables as files into `rendered`.

    The pages' links lead from `paths.REPORT` and to `paths.RENDERED`. Reads relative to the working directory. Raises
    UserError naming file and stage when one is missing. The same inputs give the same bytes.
    """
    inputs = read_inputs(params)
    runs, costs, parts, one_dimension = run_table(inputs), cost_table(inputs), sections(inputs), read_one_dimension()
    trained = [record for record in inputs.runs if record.settings]  # they come first; the others have no curves
    panels = curves.draw_panels(trained, inputs.summary.images)
    shown = gallery.gallery(inputs)
    shared = {
        "css": Markup(f"{curves.palette_css()}\n{curves.PANEL_CSS}\n{PLOTS_CSS}"),
        "data": _data_title(params),
        "pixelated": params.data.image_size <= 64,
    }
    page = (
        environment()
        .get_template("page.html.j2")
        .render(
            **shared,
            **_links(paths.REPORT),
            runs="runs/",
            shape=_shape(params),
            inputs=inputs,
            facts=facts(inputs),
            scale=_scale_sentence(inputs),
            run_table=runs,
            cost_table=costs,
            sections=parts,
            one_dimension=one_dimension,
            panels=panels,
            legend=[(record.name, Markup(curves.legend_key(index))) for index, record in enumerate(trained)],
            shown=shown,
            seeds=gallery.SIDE_BY_SIDE,
            metrics=[(column.title, column.meaning) for column in runs.columns if titles.metric(column.key).meaning],
            protocol=_protocol(inputs.runs),
            code=code_line(params),
        )
    )
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    rendered.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page, encoding="utf-8")
    of_sections = [table for part in parts for table in (*part.tables, *part.published)]
    for table in (runs, costs, *([one_dimension.table] if one_dimension else []), *of_sections):
        write_files(table, rendered)
    for record in inputs.runs:
        text = _run_page(inputs, record, trained, shared)
        (folder / "runs" / f"{record.name}.html").write_text(text, encoding="utf-8")
    (folder / "curves.svg").write_text(curves.draw_sheet(panels, [run.name for run in trained]), encoding="utf-8")
    pictures.draw_sheet(gallery.tiles(inputs), folder / "samples.png")


def _run_page(inputs: Inputs, record: RunRecord, trained: Sequence[RunRecord], shared: dict[str, Any]) -> str:
    """Return a run's own page: what it is, what was measured and how, its curves and pictures."""
    images, place = inputs.summary.images, inputs.runs.index(record)
    others = [run.name for run in inputs.runs]
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            **shared,
            **_links(paths.REPORT / "runs"),
            runs="",
            name=record.name,
            before=others[place - 1] if place else None,
            after=others[place + 1] if place + 1 < len(others) else None,
            measured=measured_table(inputs, record),
            spent=_spent(record),
            marks=curves.marks_of(record, images),
            panels=curves.draw_panels(trained, images, record) if record.settings else [],
            grid=gallery.grid(inputs, record, RUN_PICTURE_BYTES),
            strip=gallery.strip(inputs, record, RUN_PICTURE_BYTES),
            nearest=gallery.nearest_picture(inputs, record, RUN_PICTURE_BYTES),
            protocol=[(key, str(value)) for key, value in _flat(record.protocol).items()],
            resolved=_yaml(_settings(inputs.params, record)),
        )
    )


def _links(folder: Path) -> dict[str, str]:
    """Return how a page in `folder` reaches the project's root and the rendered tables."""
    return {name: f"{os.path.relpath(path, folder)}/" for name, path in (("up", "."), ("rendered", paths.RENDERED))}


def _spent(record: RunRecord) -> str:
    cost = record.cost
    if cost is None:
        return "Imported: trained elsewhere, at a cost that is not known here."
    return (
        f"{titles.duration(cost.seconds)} for {cost.updates:,} updates, {cost.images:,} images seen, "
        f"{titles.number(cost.images_per_second)} images a second on {cost.machine} ({cost.device}, {cost.threads} "
        f"thread{'s' * (cost.threads != 1)})."
    )


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
        (key, str(flat[0].get(key)) if len({str(f.get(key)) for f in flat}) == 1 else "differs: see each run's page")
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


def _settings(params: Params, record: RunRecord) -> dict[str, Any]:
    """Return a run's resolved settings; of an imported model, what params say of it and what it turned out to be."""
    if record.settings is not None:
        return record.settings.model_dump(mode="json")
    return {"imported": params.imported[record.name].model_dump(mode="json"), "model": record.config.model}


def _yaml(value: dict[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def environment() -> Environment:
    """Return the templates beside this file; all they print is escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # class names and paths are the user's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
