"""What needs no training: parameters of the real modules (Table 10) and the work of the real steps (Table 12).

Both are counted on the meta device, where nothing is computed. Counts of the paper's models depend on the code alone,
those of the runs on their settings.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

from afm_pipe.params import Run
from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.table import Cell, Column, Origin, Table, origins_of
from afm_pipe.reporting.tables import published_cell

if TYPE_CHECKING:
    from afm_pipe.models.model_files import ModelConfig
    from afm_pipe.planning.counting import Work

TITLES = {"XL/2 2": "XL/2, 2 or 4 steps", "XL/2 deep": "XL/2, blocks repeated"}
COUNTED_BATCH = 16  # work is in proportion to it; a quarter of it is penalised
CODE = "counted on the modules"
# The paper's models: name in published.yaml -> size, steps, repeats; all on 1,000 classes, latents of 4 x 32 x 32.
# YAML reads the unquoted "XL/2 2,4NFE" of that file as "XL/2 2" and an empty key: TITLES says what is meant.
PAPER_MODELS: dict[str, tuple[str, int, int]] = {
    "B/2": ("b2", 1, 1),
    "M/2": ("m2", 1, 1),
    "L/2": ("l2", 1, 1),
    "XL/2": ("xl2", 1, 1),
    "XL/2 2": ("xl2", 2, 1),
    "XL/2 deep": ("xl2", 1, 2),
}


def count_tables(inputs: Inputs) -> tuple[Table, Table]:
    """Build Tables 10 and 12 beside the paper's rows."""
    return _architectures(inputs), _compute(inputs)


def _architectures(inputs: Inputs) -> Table:
    from afm_pipe.params.sizes import SIZES

    columns = (
        Column("model", "Model", numeric=False),
        Column("depth", "Blocks", "Times they are run, where more than once", numeric=False),
        Column("width", "Width"),
        Column("heads", "Heads"),
        Column("generator_m", "Generator, M", "Parameters"),
        Column("discriminator_m", "Discriminator, M", "Parameters"),
    )
    rows: list[tuple[Cell, ...]] = []
    origins: list[Origin] = []
    for row in inputs.published["architectures"]:
        size, nfe, repeats = PAPER_MODELS[row["model"]]
        generator, discriminator = _parameters(size, nfe, repeats)
        shape, title = SIZES[size], TITLES.get(row["model"], row["model"])
        rows.append(
            (
                Cell(f"{title}, {CODE}", title),
                Cell(f"{shape.depth} × 2 or 4" if repeats > 1 else str(shape.depth), str(shape.depth)),
                Cell(str(shape.width), shape.width),
                Cell(str(shape.heads), shape.heads),
                Cell(titles.number(generator / 1e6, 4), generator / 1e6),
                Cell(titles.number(discriminator / 1e6, 4), discriminator / 1e6),
            )
        )
        depth = str(row["depth"]).replace(" x ", " × ")
        known = (published_cell(row[key]) for key in ("width", "heads", "generator_m", "discriminator_m"))
        rows.append((published_cell(title), published_cell(depth), *known))
        origins += ["ours", "paper"]
    caption = (
        "Table 10: the paper's architectures, for 1,000 classes and latents of 4 × 32 × 32. Ours are counted on the "
        "modules of afm_pipe/models; no training, no samples."
    )
    return Table("paper_architectures", caption, columns, tuple(rows), origins=tuple(origins))


def _compute(inputs: Inputs) -> Table:
    columns = (
        Column("method", "Method", numeric=False),
        Column("units", "Forward passes per update", "Of G on one batch; the update of D is included"),
        Column("generator_forward", "G forward", "In its own step and in D's"),
        Column("generator_backward", "G backward"),
        Column("discriminator_forward", "D forward", "Of real, generated and penalised latents, in both steps"),
        Column("discriminator_backward", "D backward", "To its weights in its own step, to its input in G's"),
    )
    rows: list[tuple[Cell, ...]] = [(Cell(f"XL/2, {CODE}", "XL/2"), *_unit_cells(xl2_work(inputs.params.train)))]
    rows += [
        (Cell(f"{run.name}, {CODE}", run.name, run=run.name), *_unit_cells(work))
        for run in inputs.runs
        if (work := _work(run)) is not None
    ]
    theirs = [
        (published_cell(row["method"]), *(published_cell(row.get(column.key)) for column in columns[1:]))
        for row in inputs.published["compute_units"]
    ]
    caption = (
        "Table 12: work of one generator update in forward passes. Ours count the FLOPs of matrix products in the "
        "steps that train, without guidance; no training, no samples. XL/2 stands at the paper's shape. Small models "
        "pay relatively more for what is no block, such as the penalties' own forward passes and D's token."
    )
    return Table("paper_compute", caption, columns, (*rows, *theirs), origins=origins_of(rows, theirs))


@cache
def _parameters(size: str, nfe: int, repeats: int) -> tuple[int, int]:
    import torch

    from afm_pipe.models.model_files import build_discriminator, build_generator, count_parameters

    config = _paper_config(size, nfe, repeats)
    with torch.device("meta"):
        return count_parameters(build_generator(config)), count_parameters(build_discriminator(config))


def _unit_cells(work: "Work") -> tuple[Cell, ...]:
    """Return the work of an update and its parts, in forward passes."""
    units = (work.units, *(flops / work.forward_flops for flops in work.parts))
    return tuple(Cell(titles.number(value, 4), value) for value in units)


def xl2_work(train: Run) -> "Work":
    """Return the work of an update of XL/2 in one step at the paper's shape, penalties as in the paper."""
    from afm_pipe.planning.counting import measure

    penalty = train.penalty.model_copy(update={"batch_fraction": 0.25, "every": 1})
    own = {"size": "xl2", "nfe": 1, "form": "direct", "repeats": 1, "penalty": penalty, "reuse_forward": False}
    return measure(train.model_copy(update=own), _paper_config("xl2", 1, 1), COUNTED_BATCH)


def _paper_config(size: str, nfe: int, repeats: int) -> "ModelConfig":
    from afm_pipe.models.model_files import ModelConfig

    shape = {"channels": 4, "latent_size": 32, "num_classes": 1000}
    form = {"nfe": nfe, "form": "direct" if nfe == 1 else "residual", "repeats": repeats, "qk_norm": False}
    return ModelConfig.model_validate({"size": size, **shape, **form})


def _work(record: RunRecord) -> "Work | None":
    """Return the work of an update of a run; None of a model that was not trained here."""
    from afm_pipe.models.model_files import ModelConfig
    from afm_pipe.planning.counting import measure

    run: Run | None = record.settings
    described: dict[str, Any] = record.config.model
    if run is None or not described:
        return None
    return measure(run, ModelConfig.model_validate(described), run.batch_size)
