"""The report's tables of runs and of the paper's numbers, built once; `printing.py` and the page print them."""

from collections.abc import Callable, Sequence
from typing import Any

from afm_pipe.params import Run
from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs, RunRecord
from afm_pipe.reporting.ranking import interval_note, metric_cell, ranked
from afm_pipe.reporting.table import Cell, Column, Table
from afm_pipe.runtime import paths

_SETTINGS = {
    "size": "Size",
    "seed": "Seed",
    "lr": "Learning rate",
    "batch_size": "Batch",
    "transport": "Transport weight",
    "penalty.weight": "Penalty weight",
    "gradient_normalization.enabled": "Gradient normalisation",
    "phases": "Epochs",
    "nfe": "Steps",
    "form": "Form",
    "repeats": "Repeats",
    "ema.decay": "EMA",
}


def run_table(inputs: Inputs) -> Table:
    """Build the table of runs: the settings in which they differ, metrics, cost."""
    settings = differing_settings([record.settings or record.config.model for record in inputs.runs])
    metrics = titles.in_order(key for record in inputs.runs for key in record.metrics)
    columns = (
        Column("run", "Run", numeric=False),
        *(Column(key, (kind := titles.metric(key)).title, _better(kind)) for key in metrics),
        Column("seconds", "Training time", "Time spent training"),
        Column("images_per_second", "Images/s", "Images seen by the generator per second of training"),
        *(_setting_column(key, values) for key, values in settings.items()),
    )
    rows = tuple(
        (
            Cell(record.name, record.name, run=record.name),
            *(metric_cell(record, key) for key in metrics),
            _cost_cell(record, "seconds", titles.duration) if record.cost else Cell("imported", None),
            _cost_cell(record, "images_per_second", titles.number),
            *(_setting_cell(key, values[index]) for key, values in settings.items()),
        )
        for index, record in enumerate(inputs.runs)
    )
    source = str(paths.REFERENCE / "summary.json")
    footer = (
        Cell("Floor: reconstructions", None),
        *(_floor_cell(inputs, key, source) for key in metrics),
        *(Cell("", None) for _ in range(2 + len(settings))),
    )
    measured = range(1, 1 + len(metrics))
    caption = (
        f"Runs of this repository, {titles.number(inputs.params.evaluate.samples)} samples each. Metrics from "
        f"{paths.metrics('RUN')}, cost from {paths.costs('RUN')}; a run that continues another: its own phase alone."
    )
    return Table("runs", caption, columns, tuple(ranked(rows, columns, measured)), footer, note=interval_note(rows))


def measured_table(inputs: Inputs, record: RunRecord) -> Table:
    """Build the table of all that was measured of one run, beside the floor."""
    columns = (
        Column("metric", "Metric", numeric=False),
        Column("value", "Measured"),
        Column("floor", "Floor", "The autoencoder's reconstructions of real images"),
        Column("meaning", "What it is", numeric=False),
    )
    source = str(paths.REFERENCE / "summary.json")
    rows = tuple(
        (
            Cell(titles.metric(key).title, key),
            metric_cell(record, key),
            _floor_cell(inputs, key, source),
            Cell(words := _better(titles.metric(key)), words),
        )
        for key in titles.in_order(record.metrics)
    )
    samples = titles.number(record.protocol.get("samples"))
    caption = f"{record.name}: all that was measured, over {samples} samples, from {paths.metrics(record.name)}."
    bracket = "In brackets: 95 % intervals of the measurement." if record.intervals else "No interval was recorded."
    return Table(f"run-{record.name}", caption, columns, rows, note=bracket)


def cost_table(inputs: Inputs) -> Table:
    """Build the table of what training cost."""
    columns = (
        Column("run", "Run", numeric=False),
        Column("generator_parameters", "Generator", "Parameters"),
        Column("discriminator_parameters", "Discriminator", "Parameters"),
        Column("updates", "Updates", "Generator updates, each after one of the discriminator"),
        Column("images", "Images seen", "By the generator"),
        Column("seconds", "Training time"),
        Column("updates_per_second", "Updates/s"),
        Column("images_per_second", "Images/s"),
        Column("data_wait_share", "Wait for data", "Share of the training time"),
        Column("checkpoint_share", "Saving", "Writing checkpoints, share of the training time"),
        Column("peak_memory_gib", "Peak memory"),
        Column("machine", "Machine", numeric=False),
    )
    caption = f"What training cost, from {paths.costs('RUN')}; a run that continues another: its own phase alone."
    return Table("costs", caption, columns, tuple(map(_cost_row, inputs.runs)))


def published_tables(published: dict[str, Any]) -> tuple[Table, Table]:
    """Build the paper's tables that give context: decay and weight of the transport loss."""
    grid = published["ot_gp_grid"]
    decay = Table(
        "published_transport_decay",
        "Table 2: decay of the transport weight λ_ot; B/2, one step, ImageNet 256, 100 epochs, FID-50k.",
        (Column("lambda_ot", "Transport weight", numeric=False), Column("fid", "FID-50k")),
        tuple(
            (published_cell(row["schedule"].replace("->", "→")), published_cell(row["fid"]))
            for row in published["ot_decay"]
        ),
        origin="paper",
    )
    penalty = Table(
        "published_transport_penalty",
        "Table 1: transport weight λ_ot by penalty weight λ_gp; B/2, one step, ImageNet 256, 20 epochs, FID-50k, "
        "mean and spread of two runs. λ_ot 0 diverges for every λ_gp.",
        (Column("lambda_gp", "λ_gp", numeric=False),)
        + tuple(Column(f"lambda_ot_{weight:g}", f"λ_ot {weight:g}") for weight in grid["lambda_ot"]),
        tuple(
            (
                published_cell(f"{weight:g}"),
                *(
                    Cell(f"{fid:.2f} ± {spread:g}", fid)
                    for fid, spread in zip(grid["fid"][index], grid["spread"][index], strict=True)
                ),
            )
            for index, weight in enumerate(grid["lambda_gp"])
        ),
        origin="paper",
    )
    return decay, penalty


def differing_settings(runs: Sequence[Run | dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ: dotted name -> one value per run, None where it is not known.

    A mapping stands for a model that was not trained here, with the few settings that are known of it.
    """
    flat = [_flat(run.model_dump(mode="json")) if isinstance(run, Run) else run for run in runs]
    values = {key: [settings.get(key) for settings in flat] for key in flat[0]}
    return {key: found for key, found in values.items() if any(v not in (None, found[0]) for v in found)}


def setting_text(key: str, value: Any) -> str:
    """Print a run's setting the way a person would say it."""
    if key == "transport":
        return _transport_text(value)
    if key == "phases":
        return ", then ".join(map(_phase_text, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(setting_text("", part) for part in value) if isinstance(value, list) else str(value)


def _transport_text(value: dict[str, float]) -> str:
    if value["start"] == value["end"]:
        return f"{value['start']:g}" + (" constant" if value["start"] else "")
    return f"{value['start']:g} → {value['end']:g} over {value['decay_epochs']:g} epochs"


def _phase_text(phase: dict[str, Any]) -> str:
    text = f"{phase['until_epoch']:g}"
    text += f" at lr {phase['lr']:g}" if phase.get("lr") is not None else ""
    text += f" at transport {_transport_text(phase['transport'])}" if phase.get("transport") else ""
    text += f", guided by {phase['guidance']['scale']:g}" if phase.get("guidance") else ""
    text += ", augmented" if phase.get("augment") else ""
    text += f", clipped at {phase['gradient_clip']:g}" if phase.get("gradient_clip") else ""
    text += ", EMA reload" if phase.get("reload_ema") == "epoch" else ""
    back = phase.get("reload_discriminator")
    return text + ("" if back is None else ", D reload on a stall" if back == "stall" else f", D reload from {back:g}")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and key != "transport":  # a transport is read as a whole
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _setting_column(key: str, values: list[Any]) -> Column:
    meaning = f"{key} of the run in {paths.PARAMS}"
    return Column(key, _SETTINGS.get(key, key), meaning, numeric=all(_is_number(v) for v in values if v is not None))


def _setting_cell(key: str, value: Any) -> Cell:
    if value is None:
        return Cell("", None)
    text = setting_text(key, value)
    return Cell(text, value if _is_number(value) else text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _floor_cell(inputs: Inputs, key: str, source: str) -> Cell:
    value = inputs.summary.floor(titles.base_key(key))
    if value is None:
        return Cell("", None)
    return Cell(titles.metric_text(key, value), value, source, f"{titles.base_key(key)}_reconstruction")


def _cost_cell(record: RunRecord, key: str, text: Callable[[Any], str]) -> Cell:
    if record.cost is None:
        return Cell("", None)
    value = getattr(record.cost, key)
    return Cell(text(value), value, str(paths.costs(record.name)), key)


def _cost_row(record: RunRecord) -> tuple[Cell, ...]:
    cost, config, source = record.cost, record.config, str(paths.model(record.name) / "config.json")
    texts: dict[str, Callable[[Any], str]] = {
        "updates": titles.number,
        "images": titles.number,
        "seconds": titles.duration,
        "updates_per_second": titles.number,
        "images_per_second": titles.number,
        "data_wait_share": titles.percent,
        "checkpoint_share": titles.percent,
        "peak_memory_gib": lambda value: titles.MISSING if value is None else f"{titles.number(value)} GiB",
        "machine": lambda value: f"{value}, {cost.device}, {cost.threads} threads" if cost else "",
    }
    generator, discriminator = config.generator_parameters, config.discriminator_parameters
    cells = [_cost_cell(record, key, text) for key, text in texts.items()]
    return (
        Cell(record.name, record.name, run=record.name),
        Cell(titles.millions(generator), generator, source, "generator_parameters"),
        Cell(titles.millions(discriminator), discriminator, source, "discriminator_parameters")
        if discriminator is not None
        else Cell("", None),
        *(cells if cost else (*cells[:-1], Cell("imported", None))),
    )


def _better(kind: titles.Metric) -> str:
    return f"{kind.meaning} ({kind.better} is better)" if kind.better else kind.meaning


def published_cell(value: Any, decimals: int | None = None) -> Cell:
    """Return a number or word of published.yaml as a cell; a dash where the paper gives none."""
    if value is None:
        return Cell(titles.MISSING, None)
    return Cell(f"{value:.{decimals}f}" if decimals is not None else str(value), value)
