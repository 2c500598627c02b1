"""The paper's tables: its rows beside ours in the same columns.

Tables 4 (one step), 5 (few steps), 6 (no guidance) and 9 (all metrics) are views of the same runs; 10 counts the
parameters of the real modules, 12 the work of the real steps (counts.py). Only measured results have rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from afm_pipe.planning.plan import IMAGENET_IMAGES
from afm_pipe.reporting import titles
from afm_pipe.reporting.counts import architecture_table, compute_table
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.study_published import published_table
from afm_pipe.reporting.table import EMPTY, Cell, Column, Row, Table, plain, published_cell
from afm_pipe.reporting.tables import interval_note, metric_cell
from afm_pipe.runtime import paths

PAPER_METRICS = {"fid": "fid", "sfid": "sfid", "is": "inception_score", "precision": "precision", "recall": "recall"}
"""Keys of metrics: in published.yaml -> in our metrics files."""
GUIDANCE = "cg classifier, da discriminator augmentation, cfg classifier-free, ag autoguidance, cgan conditional GAN"


LATER = (
    "One- and few-step results on ImageNet, 256 pixels, that came after the paper. None of them is a result of ours, "
    "and the figures are second-hand: taken from a survey of the papers, not from the papers themselves."
)


class Trait(NamedTuple):
    """What decides which of the paper's tables a row belongs to; guidance as in the paper: none, cg, da, cg+da."""

    nfe: int | str
    guidance: str


class View(NamedTuple):
    """One of the paper's tables: the runs it holds, and the key of other methods' rows in published.yaml."""

    anchor: str
    title: str
    others: str
    holds: Callable[[Trait], bool]
    metrics: Sequence[str] = ("fid",)
    guided: bool = False
    """Whether it holds only guided ones of the paper's models."""


VIEWS = (
    View("one-step", "Table 4: one step", "one_step_guided", lambda trait: trait.nfe == 1, guided=True),
    View("few-steps", "Table 5: few steps", "few_step_guided", lambda trait: trait.nfe != 1, guided=True),
    View("no-guidance", "Table 6: no guidance", "no_guidance", lambda trait: trait.guidance == "none"),
    View("full-metrics", "Table 9: all metrics", "full_metrics", lambda trait: True, tuple(PAPER_METRICS)),
)


def paper_sections(inputs: Inputs) -> tuple[Section, ...]:
    """Build a section for each of the paper's tables that holds results of single models, and of the counts."""
    names = {"published_transport_decay": "ot_decay", "published_transport_penalty": "ot_gp_grid"}
    context = tuple(published_table(name, key, inputs.published)._replace(name=name) for name, key in names.items())
    scale = scale_sentence(inputs)
    return (
        *(Section(view.anchor, view.title, tables=(_table(inputs, view),), warning=scale) for view in VIEWS),
        Section(
            "architectures",
            "Table 10: architectures",
            "Parameters, counted on the modules that train here, beside the paper's.",
            tables=(architecture_table(inputs),),
        ),
        Section(
            "compute",
            "Table 12: compute",
            "Forward passes of G that one update costs, D's update included; counted on the training steps of this "
            "repository, on shapes alone.",
            tables=(compute_table(inputs),),
        ),
        Section("later", "After the paper", LATER, published=(_later_table(inputs),)),
        Section(
            "published",
            "Tables 1 and 2: transport loss",
            "The paper's numbers on the weight of the transport loss and its decay, as context.",
            published=context,
        ),
    )


def scale_sentence(inputs: Inputs) -> str:
    """Say how the numbers depart from the paper's protocol, which makes them not comparable with it."""
    params, departures = inputs.params, []
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


def _table(inputs: Inputs, view: View) -> Table:
    """Build a table of our runs above the paper's rows: the paper's metrics, and those that only ours have."""
    traits = {run.name: _trait(run) for run in inputs.runs}
    runs = [run for run in inputs.runs if view.holds(traits[run.name])]
    rows = [
        row | {"model": _deep_name(row)}
        for row in inputs.published["afm"]
        if view.holds(Trait(row["nfe"], row["guidance"])) and not (view.guided and row["guidance"] == "none")
    ]
    rows += [{"guidance": "none"} | row for row in inputs.published[view.others]]
    names = [PAPER_METRICS[key] for key in view.metrics]
    others = [key for key in titles.in_order(key for run in runs for key in run.metrics) if key not in names]
    if len(names) == 1:
        others = [key for key in others if titles.is_distance(key)]
    columns = (
        Column("model", "Model", numeric=False),
        Column("nfe", "Steps", "Forward passes; x2 where guidance doubles them", numeric=False),
        Column("params_m", "Parameters, M", "Of the generator"),
        Column("epochs", "Epochs"),
        Column("guidance", "Guidance", GUIDANCE, numeric=False),
        *(
            Column(key, titles.metric(name).title, titles.metric(name).meaning)
            for key, name in zip((*view.metrics, *others), (*names, *others), strict=True)
        ),
    )
    ours = [_own_row(run, traits[run.name], (*names, *others)) for run in runs]
    theirs = [_paper_row(row, view.metrics, len(others)) for row in rows]
    caption = f"{view.title}, over 50,000 samples. AFM from Tables 9 and 11. Guidance: {GUIDANCE}. "
    caption += _own_caption(runs, others)
    name = f"paper_{view.anchor.replace('-', '_')}"
    first = ("model", "nfe", "params_m", view.metrics[0], *others[:1])
    return Table(name, caption, columns, (*ours, *theirs), note=interval_note(ours), first=first)


def _later_table(inputs: Inputs) -> Table:
    """Build the table of later methods, each with its source and date."""
    columns = (
        Column("model", "Model", numeric=False),
        Column("nfe", "Steps", "Forward passes, where the survey says how many", numeric=False),
        Column("fid", titles.metric("fid").title, titles.metric("fid").meaning),
        Column("source", "arXiv", numeric=False),
        Column("date", "Date", numeric=False),
        Column("note", "Note", numeric=False),
    )
    keys = [column.key for column in columns]
    rows = tuple(
        tuple(published_cell(row.get(key), 2 if key == "fid" else None) for key in keys)
        for row in inputs.published["later"]
    )
    caption = "Later one- and few-step results: second-hand, and no results of ours."
    return Table("published_later", caption, columns, rows, origin="paper")


def _own_row(run: RunRecord, trait: Trait, keys: Sequence[str]) -> Row:
    parameters = run.config.generator_parameters
    source = str(paths.model(run.name) / "config.json")
    until = run.settings.phases[-1].until_epoch if run.settings else None
    return (
        Cell(run.name, run.name, run=run.name),
        plain(str(trait.nfe)),
        Cell(titles.number(parameters / 1e6), parameters / 1e6, source, "generator_parameters"),
        Cell(titles.MISSING if until is None else f"{until:g}", until),
        plain(trait.guidance),
        *(metric_cell(run, key) for key in keys),
    )


def _paper_row(row: dict[str, Any], keys: Sequence[str], blanks: int) -> Row:
    return (
        published_cell(row["model"]),
        published_cell(str(row["nfe"])),
        *(published_cell(row[key]) for key in ("params_m", "epochs", "guidance")),
        *(published_cell(row[key], 2) for key in keys),
        *[EMPTY] * blanks,
    )


def _own_caption(runs: Sequence[RunRecord], others: Sequence[str]) -> str:
    if not runs:
        return "No run of this repository belongs here."
    samples = sorted({int(run.protocol["samples"]) for run in runs if run.protocol.get("samples")})
    counts = " or ".join(map(titles.number, samples)) or "an unrecorded number of"
    spaces = sorted({space for run in runs for space in run.protocol.get("features", {})})
    shares = titles.class_shares([run.protocol for run in runs])
    text = (
        f"Ours: {counts} samples{shares}, {' and '.join(spaces) or 'unrecorded'} features, from {paths.metrics('RUN')}."
    )
    return text + (" Columns without numbers of the paper are in another feature space." if others else "")


def _trait(record: RunRecord) -> Trait:
    run = record.settings
    if run is None:
        return Trait(record.config.model.get("nfe", titles.MISSING), "unknown")
    guided = any(phase.guidance is not None for phase in run.phases)
    augmented = any(phase.augment is not None for phase in run.phases)
    free = run.velocity is not None and run.velocity.sampling.guidance_scale != 1
    return Trait(run.passes, "+".join(["cg"] * guided + ["da"] * augmented + ["cfg"] * free) or "none")


def _deep_name(row: dict[str, Any]) -> str:
    deep = f", {row['depth']} layers" if row["model"] == "XL/2" and row["depth"] != 28 else ""
    return f"AFM {row['model']}{deep}"
