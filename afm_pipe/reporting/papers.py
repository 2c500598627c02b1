"""The paper's tables rebuilt: its rows beside ours in the same columns, marked so that no one takes one for the other.

Tables 4 (one step), 5 (few steps), 6 (no guidance) and 9 (all metrics) are views of the same runs; 10 counts the
parameters of the real modules, 12 the work of the real steps (counts.py). Only results that were measured have rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from afm_pipe.params import Params
from afm_pipe.reporting import titles
from afm_pipe.reporting.counts import count_tables
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.ranking import interval_note, metric_cell, ranked
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.table import Cell, Column, Table, origins_of
from afm_pipe.reporting.tables import published_cell, published_tables
from afm_pipe.runtime import paths

PAPER_METRICS = ("fid", "sfid", "is", "precision", "recall")
SAME = {"is": "inception_score"}  # what the paper's `is` is called in our metrics files
GUIDANCE = "cg classifier, da discriminator augmentation, cfg classifier-free, ag autoguidance, cgan conditional GAN"
Row = tuple[Cell, ...]


class Trait(NamedTuple):
    """What places a run in the paper's tables."""

    nfe: int | str
    guidance: str  # as in the paper: none, cg, da, cg+da
    depth: int | None  # blocks passed: 56 for 28 run twice


def paper_sections(inputs: Inputs) -> tuple[Section, ...]:
    """Build a section for each of the paper's tables that holds results of single models, and of the counts."""
    published, traits = inputs.published, {run.name: _trait(inputs.params, run) for run in inputs.runs}
    afm = [row | {"model": _deep_name(row)} for row in published["afm"]]
    warning = _warning(inputs)

    def chosen(wanted: Callable[[Trait], bool]) -> list[RunRecord]:
        return [run for run in inputs.runs if wanted(traits[run.name])]

    def build(name: str, caption: str, runs: Sequence[RunRecord], rows: Sequence[dict[str, Any]], all_: bool) -> Table:
        return _beside(name, caption, runs, rows, traits, PAPER_METRICS if all_ else ("fid",))

    one, few, none, full = (
        build(
            "paper_one_step",
            "Table 4, one step from noise to image, FID over 50,000 samples. AFM from Tables 9 and 11.",
            chosen(lambda trait: trait.nfe == 1),
            [row for row in afm if row["nfe"] == 1 and row["guidance"] != "none"] + published["one_step_guided"],
            False,
        ),
        build(
            "paper_few_steps",
            "Table 5, few steps, FID over 50,000 samples. AFM from Tables 9 and 11.",
            chosen(lambda trait: trait.nfe != 1),
            [row for row in afm if row["nfe"] != 1 and row["guidance"] != "none"] + published["few_step_guided"],
            False,
        ),
        build(
            "paper_no_guidance",
            "Table 6, without guidance, FID over 50,000 samples. AFM from Tables 9 and 11.",
            chosen(lambda trait: trait.guidance == "none"),
            [row for row in afm if row["guidance"] == "none"]
            + [row | {"guidance": "none"} for row in published["no_guidance"]],
            False,
        ),
        build(
            "paper_full_metrics",
            f"Table 9, all metrics over 50,000 samples. Guidance: {GUIDANCE}.",
            list(inputs.runs),
            afm + published["full_metrics"],
            True,
        ),
    )
    architectures, units = count_tables(inputs)
    decay, penalty = published_tables(published)
    return (
        Section(
            "one-step",
            "Table 4: one step",
            "What one forward pass gives: the paper's models and others on ImageNet, and the one-step runs of this "
            "repository.",
            tables=(one,),
            warning=warning,
        ),
        Section(
            "few-steps",
            "Table 5: few steps",
            "What a few forward passes give.",
            tables=(few,),
            warning=warning,
        ),
        Section("no-guidance", "Table 6: no guidance", "All without guidance.", tables=(none,), warning=warning),
        Section("full-metrics", "Table 9: all metrics", "Every metric, every run.", tables=(full,), warning=warning),
        Section(
            "architectures",
            "Table 10: architectures",
            "Parameters, counted on the modules that train here, beside what the paper states.",
            tables=(architectures,),
        ),
        Section(
            "compute",
            "Table 12: compute",
            "Forward passes of G that one update of it costs, its discriminator's update included; counted on the "
            "training steps of this repository, on shapes alone.",
            tables=(units,),
        ),
        Section(
            "published",
            "Tables 1 and 2: transport loss",
            "The paper's numbers on the weight of the transport loss and its decay, as context.",
            published=(decay, penalty),
        ),
    )


def _beside(
    name: str,
    caption: str,
    runs: Sequence[RunRecord],
    rows: Sequence[dict[str, Any]],
    traits: dict[str, Trait],
    keys: Sequence[str],
) -> Table:
    """Build a table of our runs above rows of the paper: the paper's metrics, and ours that it has not."""
    measured = titles.in_order(key for run in runs for key in run.metrics)
    names = {key: SAME.get(key, key) for key in keys}
    others = [key for key in measured if key not in names.values()]
    if len(keys) == 1:  # a table of one distance: ours shows its distances only
        others = [key for key in others if titles.is_distance(key)]
    columns = (
        Column("model", "Model", numeric=False),
        Column("nfe", "Steps", "Forward passes; x2 where guidance doubles them", numeric=False),
        Column("params_m", "Parameters, M", "Of the generator"),
        Column("epochs", "Epochs"),
        Column("guidance", "Guidance", GUIDANCE, numeric=False),
        *(Column(key, titles.metric(names[key]).title, titles.metric(names[key]).meaning) for key in keys),
        *(Column(key, titles.metric(key).title, titles.metric(key).meaning) for key in others),
    )
    ours = [_own_row(run, traits[run.name], [*names.values(), *others]) for run in runs]
    theirs = [_paper_row(row, keys, len(others)) for row in rows]
    ours = ranked(ours, columns, range(5, len(columns)))
    spoken = f"{caption} {_own_caption(runs, others)}"
    return Table(name, spoken, columns, (*ours, *theirs), origins=origins_of(ours, theirs), note=interval_note(ours))


def _own_row(run: RunRecord, trait: Trait, keys: Sequence[str]) -> Row:
    parameters = run.config.generator_parameters
    source = str(paths.model(run.name) / "config.json")
    until = run.settings.phases[-1].until_epoch if run.settings else None
    return (
        Cell(run.name, run.name, run=run.name),
        Cell(str(trait.nfe), str(trait.nfe)),
        Cell(titles.number(parameters / 1e6), parameters / 1e6, source, "generator_parameters"),
        Cell(titles.MISSING if until is None else f"{until:g}", until),
        Cell(trait.guidance, trait.guidance),
        *(metric_cell(run, key) for key in keys),
    )


def _paper_row(row: dict[str, Any], keys: Sequence[str], blanks: int) -> Row:
    return (
        published_cell(row["model"]),
        published_cell(str(row["nfe"])),
        *(published_cell(row[key]) for key in ("params_m", "epochs", "guidance")),
        *(published_cell(row[key], 2) for key in keys),
        *(Cell("", None) for _ in range(blanks)),
    )


def _own_caption(runs: Sequence[RunRecord], others: Sequence[str]) -> str:
    if not runs:
        return "No run of this repository belongs here."
    samples = sorted({int(run.protocol["samples"]) for run in runs if run.protocol.get("samples")})
    counts = " or ".join(titles.number(count) for count in samples) or "an unrecorded number of"
    spaces = sorted({space for run in runs for space in run.protocol.get("features", {})})
    text = f"Ours: {counts} samples, {' and '.join(spaces) or 'unrecorded'} features, from {paths.metrics('RUN')}."
    return text + (" Columns the paper has no number for are in another feature space." if others else "")


def _trait(params: Params, record: RunRecord) -> Trait:
    if record.settings is None:
        nfe = record.config.model.get("nfe", titles.MISSING)
        return Trait(nfe, "unknown", None)
    run = record.settings
    guided = any(phase.guidance is not None for phase in run.phases)
    augmented = any(phase.augment is not None for phase in run.phases)
    return Trait(run.nfe, "+".join(["cg"] * guided + ["da"] * augmented) or "none", run.repeats)


def _warning(inputs: Inputs) -> str:
    small = inputs.summary.images < 1_281_167 or inputs.params.data.image_size != 256
    if not small:
        return "Compare only where the images are ImageNet's and the reference is its full training set."
    return (
        f"Our rows are {titles.number(inputs.summary.images)} images of {inputs.params.data.image_size} pixels, in "
        "another feature space than the paper's FID: they stand here to be read, not to be compared with its rows."
    )


def _deep_name(row: dict[str, Any]) -> str:
    deep = f", {row['depth']} layers" if row["model"] == "XL/2" and row["depth"] != 28 else ""
    return f"AFM {row['model']}{deep}"
