"""The paper's tables: its rows beside ours in the same columns.

Tables 4 (one step), 5 (few steps), 6 (no guidance) and 9 (all metrics) are views of the same runs; 10 counts the
parameters of the real modules, 12 the work of the real steps (counts.py). Only measured results have rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from afm_pipe.reporting import titles
from afm_pipe.reporting.counts import count_tables
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.ranking import Row, interval_note, metric_cell, ranked
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.table import EMPTY, Cell, Column, Table, plain, published_cell
from afm_pipe.reporting.tables import published_tables
from afm_pipe.runtime import paths

PAPER_METRICS = {"fid": "fid", "sfid": "sfid", "is": "inception_score", "precision": "precision", "recall": "recall"}
"""The paper's metrics by their key in published.yaml, with their keys in our metrics files."""
GUIDANCE = "cg classifier, da discriminator augmentation, cfg classifier-free, ag autoguidance, cgan conditional GAN"
IMAGENET_IMAGES = 1_281_167
_AFM = "FID over 50,000 samples. AFM from Tables 9 and 11."


class Trait(NamedTuple):
    """The place of a run or a published row in the paper's tables."""

    nfe: int | str
    guidance: str
    """As in the paper: none, cg, da, cg+da."""


class View(NamedTuple):
    """One of the paper's tables: the results it holds, and the rows of others in published.yaml."""

    anchor: str
    title: str
    prose: str
    caption: str
    holds: Callable[[Trait], bool]
    """Whether a run of ours belongs here; of the paper's, guided tables hold guided ones alone."""
    others: str
    guided: bool = False
    metrics: Sequence[str] = ("fid",)


VIEWS = (
    View(
        "one-step",
        "Table 4: one step",
        "One forward pass: the paper's models and others on ImageNet, and the one-step runs of this repository.",
        f"Table 4, one step from noise to image, {_AFM}",
        lambda trait: trait.nfe == 1,
        "one_step_guided",
        guided=True,
    ),
    View(
        "few-steps",
        "Table 5: few steps",
        "A few forward passes.",
        f"Table 5, few steps, {_AFM}",
        lambda trait: trait.nfe != 1,
        "few_step_guided",
        guided=True,
    ),
    View(
        "no-guidance",
        "Table 6: no guidance",
        "All results without guidance.",
        f"Table 6, without guidance, {_AFM}",
        lambda trait: trait.guidance == "none",
        "no_guidance",
    ),
    View(
        "full-metrics",
        "Table 9: all metrics",
        "Every metric of every run.",
        f"Table 9, all metrics over 50,000 samples. Guidance: {GUIDANCE}.",
        lambda trait: True,
        "full_metrics",
        metrics=tuple(PAPER_METRICS),
    ),
)


def paper_sections(inputs: Inputs) -> tuple[Section, ...]:
    """Build a section for each of the paper's tables that holds results of single models, and of the counts."""
    architectures, units = count_tables(inputs)
    decay, penalty = published_tables(inputs.published)
    warning = _warning(inputs)
    return (
        *(
            Section(view.anchor, view.title, view.prose, tables=(_table(inputs, view),), warning=warning)
            for view in VIEWS
        ),
        Section(
            "architectures",
            "Table 10: architectures",
            "Parameters, counted on the modules that train here, beside the paper's.",
            tables=(architectures,),
        ),
        Section(
            "compute",
            "Table 12: compute",
            "Forward passes of G that one update costs, D's update included; counted on the training steps of this "
            "repository, on shapes alone.",
            tables=(units,),
        ),
        Section(
            "published",
            "Tables 1 and 2: transport loss",
            "The paper's numbers on the weight of the transport loss and its decay, as context.",
            published=(decay, penalty),
        ),
    )


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
    ours = ranked(ours, columns, range(5, len(columns)))
    theirs = [_paper_row(row, view.metrics, len(others)) for row in rows]
    name, caption = f"paper_{view.anchor.replace('-', '_')}", f"{view.caption} {_own_caption(runs, others)}"
    return Table(name, caption, columns, (*ours, *theirs), note=interval_note(ours))


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
    text = f"Ours: {counts} samples, {' and '.join(spaces) or 'unrecorded'} features, from {paths.metrics('RUN')}."
    return text + (" Columns without numbers of the paper are in another feature space." if others else "")


def _trait(record: RunRecord) -> Trait:
    run = record.settings
    if run is None:
        return Trait(record.config.model.get("nfe", titles.MISSING), "unknown")
    guided = any(phase.guidance is not None for phase in run.phases)
    augmented = any(phase.augment is not None for phase in run.phases)
    return Trait(run.nfe, "+".join(["cg"] * guided + ["da"] * augmented) or "none")


def _warning(inputs: Inputs) -> str:
    if inputs.summary.images >= IMAGENET_IMAGES and inputs.params.data.image_size == 256:
        return "Compare only if the images are ImageNet's and the reference is its full training set."
    return (
        f"Our rows are of {titles.number(inputs.summary.images)} images of {inputs.params.data.image_size} pixels, in "
        "another feature space than the paper's FID: they are not comparable with the paper's rows."
    )


def _deep_name(row: dict[str, Any]) -> str:
    deep = f", {row['depth']} layers" if row["model"] == "XL/2" and row["depth"] != 28 else ""
    return f"AFM {row['model']}{deep}"
