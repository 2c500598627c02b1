"""Tables of the runs: settings, metrics, cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from afm_pipe.params import Run
from afm_pipe.reporting import titles
from afm_pipe.reporting.inputs import Inputs, RunRecord, Summary, is_number
from afm_pipe.reporting.table import EMPTY, Cell, Column, Row, Table, plain
from afm_pipe.runtime import paths

SETTINGS = {
    "size": "Size",
    "seed": "Seed",
    "lr": "Learning rate",
    "batch_size": "Batch",
    "transport": "Transport weight",
    "penalty.weight": "Penalty weight",
    "gradient_normalization.enabled": "Gradient normalization",
    "phases": "Epochs",
    "nfe": "Steps",
    "form": "Form",
    "repeats": "Repeats",
    "ema.decay": "EMA",
}
COSTS: Mapping[str, tuple[Column, Callable[[Any], str]]] = {
    column.key: (column, text)
    for column, text in (
        (Column("updates", "Updates", "Generator updates, each after one of the discriminator"), titles.number),
        (Column("images", "Images seen", "By the generator"), titles.number),
        (Column("seconds", "Training time", "Time spent training"), titles.duration),
        (Column("updates_per_second", "Updates/s"), titles.number),
        (Column("images_per_second", "Images/s", "Images seen by the generator per second"), titles.number),
        (Column("data_wait_share", "Data wait", "Share of the training time"), titles.percent),
        (Column("checkpoint_share", "Checkpoints", "Share of the training time spent writing them"), titles.percent),
        (Column("peak_memory_gib", "Peak memory"), lambda value: f"{titles.number(value)} GiB"),
        (Column("machine", "Machine", numeric=False), str),
    )
}
FLOOR = str(paths.REFERENCE / "summary.json")
INTERVALS = (
    "In brackets: the 95 % interval of measuring one run. Nothing is ranked by it: training with another seed may lie "
    "outside."
)
NO_INTERVALS = "Each row is one run with one seed, measured without an interval: nothing is ranked."


def run_table(inputs: Inputs) -> Table:
    """Build the table of runs: metrics, cost, and the settings that differ between runs."""
    settings = differing_settings([record.settings or record.config.model for record in inputs.runs])
    metrics = titles.in_order(key for record in inputs.runs for key in record.metrics)
    columns = (
        Column("run", "Run", numeric=False),
        Column("weights", "Weights", "EMA weights: those of the run's end, or the best measured in training", False),
        *(Column(key, titles.metric(key).title, _meaning(key)) for key in metrics),
        *(COSTS[key][0] for key in ("seconds", "images_per_second")),
        *(_setting_column(key, values) for key, values in settings.items()),
    )
    rows = tuple(
        (
            Cell(record.name, record.name, run=record.name),
            plain(weights_text(record, inputs.params.evaluate.features[0])),
            *(metric_cell(record, key) for key in metrics),
            *_cost_cells(record, "seconds", "images_per_second"),
            *(_setting_cell(key, values[index]) for key, values in settings.items()),
        )
        for index, record in enumerate(inputs.runs)
    )
    footer = (
        Cell("Floor: reconstructions", None),
        EMPTY,
        *(_floor_cell(inputs, key) for key in metrics),
        *[EMPTY] * (2 + len(settings)),
    )
    shares = titles.class_shares(run.protocol for run in inputs.runs)
    decoder = inputs.params.autoencoder.decoder
    by = f", decoded by {decoder}" if decoder else ""
    caption = (
        f"Runs of this repository, {titles.number(inputs.params.evaluate.samples)} samples each{shares}{by}. Metrics "
        f"from {paths.metrics('RUN')}, cost from {paths.costs('RUN')}; of a run that continues another, its own phase "
        "alone."
    )
    note = " ".join(filter(None, [interval_note(rows), held_out_note(inputs.summary)]))
    distance = next(filter(titles.is_distance, metrics), "")
    ratio = next((key for key in metrics if titles.base_key(key) == f"ratio_{titles.base_key(distance)}"), "")
    first = ("run", distance, ratio, "class_accuracy", "seconds")
    return Table("runs", caption, columns, rows, footer, note=note, first=first)


def metric_cell(record: RunRecord, key: str) -> Cell:
    """Return a run's metric as a cell: 7.0 [6.6, 7.4] where it has an interval."""
    if key not in record.metrics:
        return Cell(titles.MISSING, None)
    value, interval = record.metrics[key], record.intervals.get(key)
    text = titles.metric_text(key, value)
    if interval is not None and value is not None:
        text += f" [{titles.metric_text(key, interval[0])}, {titles.metric_text(key, interval[1])}]"
    return Cell(text, value, str(paths.metrics(record.name)), key, interval)


def interval_note(rows: Sequence[Row]) -> str:
    """Say what the intervals of a table of runs are, and that they rank nothing."""
    if not rows:
        return ""
    return INTERVALS if any(cell.interval for row in rows for cell in row) else NO_INTERVALS


def held_out_note(summary: Summary) -> str:
    """Say what held-out real images measure, with which ratios and differences compare samples; nothing without any."""
    held = summary.held_out
    if held is None:
        return ""
    values = {key: value for key, value in held.items() if isinstance(value, tuple)}
    if not values:
        return "Too few real images are held out to compare samples with them."
    listed = ", ".join(
        f"{titles.metric(key).title} {titles.number(values[key][0])} [{', '.join(map(titles.number, values[key][1:]))}]"
        for key in titles.in_order(values)
    )
    return f"Ratios and differences compare samples with real images that nothing was trained on, which have {listed}."


def weights_text(record: RunRecord, network: str) -> str:
    """Return which weights of a run are measured: its last ones, or the best ones and what chose them.

    `network`, the first of evaluate.features, is that of the distance that chooses.
    """
    chosen = record.config.selection
    if chosen is None:
        return "end"
    distance = titles.metric(titles.distance_in(network)).title
    return f"best of {chosen.of}, chosen on {distance} of {chosen.samples:,} samples"


def measured_table(inputs: Inputs, record: RunRecord) -> Table:
    """Build the table of all metrics of one run, beside the floor."""
    columns = (
        Column("metric", "Metric", numeric=False),
        Column("value", "Measured"),
        Column("floor", "Floor", "The autoencoder's reconstructions of real images"),
        Column("meaning", "Meaning", numeric=False),
    )
    rows = tuple(
        (
            Cell(titles.metric(key).title, key),
            metric_cell(record, key),
            _floor_cell(inputs, key),
            plain(_meaning(key)),
        )
        for key in titles.in_order(record.metrics)
    )
    samples = titles.number(record.protocol.get("samples"))
    shares = titles.class_shares([record.protocol])
    decoder = inputs.params.autoencoder.decoder
    by = f", decoded by {decoder}" if decoder else ""
    caption = f"{record.name}: all metrics, over {samples} samples{shares}{by}, from {paths.metrics(record.name)}."
    note = "In brackets: 95 % intervals of the measurement." if record.intervals else "No interval was recorded."
    return Table(f"run-{record.name}", caption, columns, rows, note=note)


def cost_table(inputs: Inputs) -> Table:
    """Build the table of training costs."""
    columns = (
        Column("run", "Run", numeric=False),
        Column("generator_parameters", "Generator", "Parameters"),
        Column("discriminator_parameters", "Discriminator", "Parameters"),
        *(column for column, _ in COSTS.values()),
    )
    rows = tuple(
        (
            Cell(record.name, record.name, run=record.name),
            *(_parameters_cell(record, f"{network}_parameters") for network in ("generator", "discriminator")),
            *_cost_cells(record, *COSTS),
        )
        for record in inputs.runs
    )
    caption = f"Training cost, from {paths.costs('RUN')}; of a run that continues another, its own phase alone."
    first = ("run", "generator_parameters", "images", "seconds", "images_per_second")
    return Table("costs", caption, columns, rows, first=first)


def differing_settings(runs: Sequence[Run | dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that differ between runs: dotted name -> one value per run, None if unknown.

    A mapping holds the few known settings of an imported model.
    """
    flat = [flatten(run.model_dump(mode="json"), whole=("transport",)) if isinstance(run, Run) else run for run in runs]
    values = {key: [settings.get(key) for settings in flat] for key in flat[0]}
    return {key: found for key, found in values.items() if any(v not in (None, found[0]) for v in found)}


def setting_words(run: Run, shared: Run) -> str:
    """Say in which settings, besides its seed, a run differs from the shared ones."""
    found = differing_settings([shared, run])
    parts = [f"{SETTINGS.get(key, key)} {setting_text(key, own)}" for key, (_, own) in found.items() if key != "seed"]
    words = "; ".join(parts) or "The shared settings"
    return words[0].upper() + words[1:]


def flatten(value: dict[str, Any], whole: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys, except those at the keys in `whole`."""
    flat: dict[str, Any] = {}
    for key, part in value.items():
        nested = isinstance(part, dict) and key not in whole
        flat |= flatten(part, whole, f"{prefix}{key}.") if nested else {f"{prefix}{key}": part}
    return flat


def setting_text(key: str, value: Any) -> str:
    """Format a run's setting."""
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


def _setting_column(key: str, values: list[Any]) -> Column:
    numeric = all(is_number(value) for value in values if value is not None)
    return Column(key, SETTINGS.get(key, key), f"{key} of the run in {paths.PARAMS}", numeric)


def _setting_cell(key: str, value: Any) -> Cell:
    if value is None:
        return EMPTY
    text = setting_text(key, value)
    return Cell(text, value if is_number(value) else text)


def _floor_cell(inputs: Inputs, key: str) -> Cell:
    base = titles.base_key(key)
    value = inputs.summary.floor(base)
    return EMPTY if value is None else Cell(titles.metric_text(key, value), value, FLOOR, f"{base}_reconstruction")


def _cost_cells(record: RunRecord, *keys: str) -> Row:
    """Return some costs of a run; for an imported model, the last cell says so."""
    cost = record.cost
    if cost is None:
        return (*[EMPTY] * (len(keys) - 1), Cell("imported", None))
    values = {key: getattr(cost, key) for key in keys}
    texts = {key: titles.MISSING if value is None else COSTS[key][1](value) for key, value in values.items()}
    if "machine" in texts:
        texts["machine"] += f", {cost.device}, {cost.threads} threads"
    return tuple(Cell(texts[key], value, str(paths.costs(record.name)), key) for key, value in values.items())


def _parameters_cell(record: RunRecord, key: str) -> Cell:
    count = getattr(record.config, key)
    source = str(paths.model(record.name) / "config.json")
    return EMPTY if count is None else Cell(titles.millions(count), count, source, key)


def _meaning(key: str) -> str:
    kind = titles.metric(key)
    return f"{kind.meaning} ({kind.better} is better)" if kind.better else kind.meaning
