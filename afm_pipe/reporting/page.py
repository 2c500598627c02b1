"""Write the report: an index and a page per run, each a single file; pictures; and the tables as files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from afm_pipe.params import Params
from afm_pipe.params.yaml import dump_yaml
from afm_pipe.reporting import curves, gallery, pictures, titles
from afm_pipe.reporting.benchmarks import benchmark_sections
from afm_pipe.reporting.inputs import Inputs, RunRecord, read_inputs
from afm_pipe.reporting.one_dimension import read_one_dimension
from afm_pipe.reporting.papers import paper_sections, scale_sentence
from afm_pipe.reporting.plots import stylesheet
from afm_pipe.reporting.printing import write_files
from afm_pipe.reporting.section import Group, Section
from afm_pipe.reporting.status import code_line
from afm_pipe.reporting.study import study_sections
from afm_pipe.reporting.study_verdicts import CHECKS
from afm_pipe.reporting.summary import facts, findings, lowest_run
from afm_pipe.reporting.tables import cost_table, flatten, measured_table, run_table
from afm_pipe.runtime import paths
from afm_pipe.study.results import runs_over_seeds

RUN_PICTURE_BYTES = 2**20  # of each of the three pictures of a run's own page
DATA_TITLES = {"mnist5k": "MNIST-5k (handwritten digits)", "clothing": "photographs of clothes"}


def write_report(params: Params, folder: Path, rendered: Path) -> None:
    """Write the pages and pictures of the runs in params into `folder`, the tables as files into `rendered`.

    Links assume that the pages are in `paths.REPORT` and the tables in `paths.RENDERED`. Reads relative to the working
    directory. Raises UserError naming file and stage if one is missing. The same inputs give the same bytes.
    """
    inputs = read_inputs(params)
    runs, costs, one_dimension = run_table(inputs), cost_table(inputs), read_one_dimension()
    groups = sections(inputs)
    parts = [part for group in groups for part in group.sections]
    over_seeds = _over_seeds(inputs, parts)
    trained = [record for record in inputs.runs if record.settings]  # imported models come last and have no curves
    panels = curves.draw_panels(trained, inputs.summary.images)
    page = render(
        "page.html.j2",
        paths.REPORT,
        **_shared(params),
        shape=f"{params.data.image_size} × {params.data.image_size} {'gray' if params.data.channels == 1 else 'RGB'}",
        inputs=inputs,
        findings=findings(inputs),
        facts=facts(inputs),
        opening=gallery.opening(inputs, lowest_run(inputs)),
        scale=scale_sentence(inputs),
        run_table=runs,
        cost_table=costs,
        over_seeds=over_seeds,
        groups=[
            group._replace(sections=tuple(part for part in group.sections if part is not over_seeds))
            for group in groups
        ],
        checked=next((part for part in parts if part.anchor == CHECKS), None),
        one_dimension=one_dimension,
        panels=panels,
        legend=curves.legend(trained),
        shown=gallery.gallery(inputs),
        seeds=gallery.SIDE_BY_SIDE,
        metrics=[(column.title, f"{column.meaning}.") for column in runs.columns if titles.metric(column.key).meaning],
        protocol=_common_protocol(inputs.runs),
        code=code_line(params),
    )
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    rendered.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page, encoding="utf-8")
    for record in inputs.runs:
        page = _run_page(inputs, record, trained)
        (folder / "runs" / f"{record.name}.html").write_text(page, encoding="utf-8")
    (folder / "curves.svg").write_text(curves.draw_sheet(panels, [run.name for run in trained]), encoding="utf-8")
    pictures.draw_sheet(gallery.tiles(inputs), folder / "samples.png")
    of_sections = [table for part in parts for table in (*part.tables, *part.published)]
    of_toy = (one_dimension.table, one_dimension.strong) if one_dimension else ()
    for table in (runs, costs, *of_toy, *of_sections):
        if table is not None:
            write_files(table, rendered)


def sections(inputs: Inputs) -> tuple[Group, ...]:
    """Return the sections between training and the toy. To add one, write a function that returns a `Section`."""
    of_paper = paper_sections(inputs)
    if {"ot_gp_grid", "ot_decay"} <= {table.paper for table in inputs.params.tables.values()}:
        of_paper = tuple(section for section in of_paper if section.anchor != "published")  # the study shows both
    study = study_sections(inputs)
    return (
        *((Group("study", "The study", study),) if study else ()),
        Group("paper", "Beside the paper", of_paper),
        Group("method", "Method", benchmark_sections()),
    )


def _over_seeds(inputs: Inputs, parts: Sequence[Section]) -> Section | None:
    """Return the section on the runs over seeds, if they were repeated."""
    results = runs_over_seeds(inputs.params)
    return next((part for part in parts if results and part.anchor == f"study-{results.name}"), None)


def render(template: str, folder: Path, **values: Any) -> str:
    """Render a page for `folder`; all text is escaped, because class names and paths are untrusted."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    links = {"up": Path(), "rendered": paths.RENDERED, "runs": paths.REPORT / "runs"}
    relative = {name: "" if path == folder else f"{os.path.relpath(path, folder)}/" for name, path in links.items()}
    return environment.get_template(template).render(css=Markup(stylesheet()), **relative, **values)


def _run_page(inputs: Inputs, record: RunRecord, trained: Sequence[RunRecord]) -> str:
    """Return a run's own page: metrics and protocol, curves, pictures, settings."""
    images, place, names = inputs.summary.images, inputs.runs.index(record), inputs.params.names
    grid, strip, nearest = (
        gallery.run_picture(inputs, record, name, caption, RUN_PICTURE_BYTES)
        for name, caption in (
            ("grid", "Samples"),
            ("interpolation", "From seed to seed"),
            ("nearest", "Samples, each above the training images nearest to it in pixels"),
        )
    )
    return render(
        "run.html.j2",
        paths.REPORT / "runs",
        **_shared(inputs.params),
        name=record.name,
        before=names[place - 1] if place else None,
        after=names[place + 1] if place + 1 < len(names) else None,
        measured=measured_table(inputs, record),
        spent=_cost_sentence(record),
        marks=curves.marks_of(record, images),
        panels=curves.draw_panels(trained, images, record) if record.settings else [],
        pictures=(grid, strip, nearest),
        protocol=_protocol(record),
        outdated=record.outdated,
        resolved=_settings_yaml(inputs.params, record),
    )


def _shared(params: Params) -> dict[str, Any]:
    data = DATA_TITLES.get(params.data.source, f"images of {params.data.root}")
    return {"data": data, "pixelated": params.data.image_size <= 64, "decoder": params.autoencoder.decoder}


def _cost_sentence(record: RunRecord) -> str:
    cost = record.cost
    if cost is None:
        return "Imported: trained elsewhere, at an unknown cost."
    return (
        f"{titles.duration(cost.seconds)} for {cost.updates:,} updates, {cost.images:,} images seen, "
        f"{titles.number(cost.images_per_second)} images a second on {cost.machine} ({cost.device}, {cost.threads} "
        f"thread{'s' * (cost.threads != 1)})."
    )


def _protocol(record: RunRecord) -> dict[str, str]:
    """Return the protocol of a run, by name."""
    flat = flatten(record.protocol)
    return {key.replace("_", " ").replace(".", ": "): str(value) for key, value in flat.items()}


def _common_protocol(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return the protocol that all runs share; differing entries say so."""
    found = [_protocol(run) for run in runs]
    names = dict.fromkeys(name for protocol in found for name in protocol)
    values = {name: {protocol.get(name, "None") for protocol in found} for name in names}
    return {name: each.pop() if len(each) == 1 else "differs: see each run's page" for name, each in values.items()}


def _settings_yaml(params: Params, record: RunRecord) -> str:
    """Return a run's resolved settings; of an imported model, its params and its own description."""
    if record.settings is not None:
        settings = record.settings.model_dump(mode="json")
    else:
        imported = params.imported[record.name].model_dump(mode="json")
        settings = {"imported": imported, "model": record.config.model}
    return dump_yaml(settings)
