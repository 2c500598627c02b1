"""Tables that need no training: parameters of the real modules (Table 10) and FLOPs of the real steps (Table 12).

Both are counted on the meta device, without computing anything.
"""

import torch

from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator, count_parameters
from afm_pipe.params import Run
from afm_pipe.params.sizes import SIZES
from afm_pipe.planning.counting import Work, measure
from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs
from afm_pipe.reporting.table import Cell, Column, Row, Table, plain, published_cell

COUNTED_BATCH = 16  # work is proportional to it; a quarter of it is penalized
CODE = "counted on the modules"
# The paper's models: name in published.yaml -> size, steps, repeats and, where it differs, the title.
# YAML reads the unquoted "XL/2 2,4NFE" of that file as "XL/2 2" and an empty key.
PAPER_MODELS: dict[str, tuple[str, int, int, str]] = {
    "B/2": ("b2", 1, 1, ""),
    "M/2": ("m2", 1, 1, ""),
    "L/2": ("l2", 1, 1, ""),
    "XL/2": ("xl2", 1, 1, ""),
    "XL/2 2": ("xl2", 2, 1, "XL/2, 2 or 4 steps"),
    "XL/2 deep": ("xl2", 1, 2, "XL/2, blocks repeated"),
}


def architecture_table(inputs: Inputs) -> Table:
    """Build Table 10 beside the paper's rows."""
    columns = (
        Column("model", "Model", numeric=False),
        Column("depth", "Blocks", "Times they are run, where more than once", numeric=False),
        Column("width", "Width"),
        Column("heads", "Heads"),
        Column("generator_m", "Generator, M", "Parameters"),
        Column("discriminator_m", "Discriminator, M", "Parameters"),
    )
    rows: list[Row] = []
    for row in inputs.published["architectures"]:
        size, nfe, repeats, title = PAPER_MODELS[row["model"]]
        shape, title = SIZES[size], title or row["model"]
        counted = (
            Cell(f"{title}, {CODE}", title),
            Cell(f"{shape.depth} × 2 or 4" if repeats > 1 else str(shape.depth), str(shape.depth)),
            *map(plain, (shape.width, shape.heads)),
            *(Cell(titles.number(count / 1e6, 4), count / 1e6) for count in _parameters(size, nfe, repeats)),
        )
        theirs = (title, str(row["depth"]).replace(" x ", " × "), *(row[column.key] for column in columns[2:]))
        rows += [counted, tuple(map(published_cell, theirs))]
    caption = (
        "Table 10: the paper's architectures, for 1,000 classes and latents of 4 × 32 × 32. Ours are counted on the "
        "modules of afm_pipe/models; no training, no samples."
    )
    return Table("paper_architectures", caption, columns, tuple(rows))


def compute_table(inputs: Inputs) -> Table:
    """Build Table 12 beside the paper's rows."""
    columns = (
        Column("method", "Method", numeric=False),
        Column("units", "Forward passes per update", "Of G on one batch; the update of D is included"),
        Column("generator_forward", "G forward", "In its own step and in D's"),
        Column("generator_backward", "G backward"),
        Column("discriminator_forward", "D forward", "Of real, generated and penalized latents, in both steps"),
        Column("discriminator_backward", "D backward", "To its weights in its own step, to its input in G's"),
    )
    rows: list[Row] = [(Cell(f"XL/2, {CODE}", "XL/2"), *_unit_cells(xl2_work(inputs.params.train)))]
    rows += [
        (
            Cell(f"{run.name}, {CODE}", run.name, run=run.name),
            *_unit_cells(measure(run.settings, ModelConfig.model_validate(run.config.model), run.settings.batch_size)),
        )
        for run in inputs.runs
        if run.settings is not None and run.config.model
    ]
    theirs = [
        tuple(published_cell(row.get(column.key)) for column in columns) for row in inputs.published["compute_units"]
    ]
    caption = (
        "Table 12: work of one generator update in forward passes. Ours count the FLOPs of matrix products in the "
        "training steps, without guidance; no training, no samples. XL/2 has the paper's shape. Small models pay "
        "relatively more outside their blocks, such as for the penalties' forward passes and D's token."
    )
    return Table("paper_compute", caption, columns, (*rows, *theirs))


def _parameters(size: str, nfe: int, repeats: int) -> tuple[int, int]:
    """Return the parameters of G and D."""
    config = _paper_config(size, nfe, repeats)
    with torch.device("meta"):
        return count_parameters(build_generator(config)), count_parameters(build_discriminator(config))


def _unit_cells(work: Work) -> Row:
    """Return the work of an update and its parts, in forward passes."""
    units = (work.units, *(flops / work.forward_flops for flops in work.parts))
    return tuple(Cell(titles.number(value, 4), value) for value in units)


def xl2_work(train: Run) -> Work:
    """Return the work of an update of one-step XL/2 at the paper's shape, with the paper's penalties."""
    penalty = train.penalty.model_copy(update={"batch_fraction": 0.25, "every": 1})
    own = {"size": "xl2", "nfe": 1, "form": "direct", "repeats": 1, "penalty": penalty, "reuse_forward": False}
    return measure(train.model_copy(update=own), _paper_config("xl2", 1, 1), COUNTED_BATCH)


def _paper_config(size: str, nfe: int, repeats: int) -> ModelConfig:
    shape = {"channels": 4, "latent_size": 32, "num_classes": 1000}
    form = {"nfe": nfe, "form": "direct" if nfe == 1 else "residual", "repeats": repeats, "qk_norm": False}
    return ModelConfig.model_validate({"size": size, **shape, **form})
