"""The measured part of a model card: metrics, how they were measured, and whose terms apply to which part."""

from typing import Any

from afm_pipe.params import Params
from afm_pipe.reporting.titles import MISSING, in_order, metric, metric_text
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import json_value, read_json

# Entries of the protocol that a reader compares, in their order; hashes and the rest stay in the metrics' file.
PROTOCOL = {
    "samples": "samples",
    "nfe": "steps per sample (NFE)",
    "weights": "weights",
    "decoder": "decoded by",
    "seed": "seed of the first sample",
    "label_mode": "classes of the samples",
    "class_shares": "shares of classes",
    "reference": "compared with",
    "reference_images": "real images",
    "kid_subsets": "subsets of the kernel distance",
    "kid_subset_size": "images per subset",
    "precision_recall": "precision and recall",
    "intervals": "intervals",
    "feature_precision": "precision of the features",
    "decode_precision": "precision of decoding",
    "device": "device",
}


def model_card_sections(name: str, sha256: str, autoencoder_sha256: str, params: Params | None) -> str:
    """Return the sections on evaluation and licenses of a model whose weights have a hash, as Markdown.

    Metrics of other weights, or with another autoencoder, are not shown.
    """
    path = paths.metrics(name)
    metrics = read_json(path) if path.is_file() else None
    protocol = metrics.get("protocol", {}) if isinstance(metrics, dict) else {}
    hashes = protocol.get("generator_sha256"), protocol.get("autoencoder_sha256")
    if metrics is None:
        measured = "This model was not measured before it was exported."
    elif hashes != (sha256, autoencoder_sha256):
        measured = f"`{path}` is of other weights, so no metrics are shown."
    else:
        measured = f"{_metrics_table(metrics)}\n\n{_protocol(protocol)}"
    return f"## Evaluation\n\n{measured}\n\n## Licenses\n\n{_licenses(name, params)}\n"


def _metrics_table(metrics: dict[str, Any]) -> str:
    intervals = metrics.get("intervals") or {}
    lines = ["| metric | value | 95 % interval | better | meaning |", "| --- | ---: | ---: | --- | --- |"]
    for key in in_order(key for key, value in metrics.items() if isinstance(value, int | float)):
        words, bounds = metric(key), intervals.get(key)
        between = ", ".join(metric_text(key, bound) for bound in bounds) if bounds else MISSING
        value = metric_text(key, metrics[key])
        lines.append(f"| {words.title} | {value} | {between} | {words.better or MISSING} | {words.meaning} |")
    return "\n".join(lines)


def _protocol(protocol: dict[str, Any]) -> str:
    lines = [f"| {title} | {_plain(protocol[key])} |" for key, title in PROTOCOL.items() if key in protocol]
    shown = "\n".join(["How it was measured:", "", "| | |", "| --- | --- |", *lines])
    return f"{shown}\n\nA distance in features other than Inception's compares with no published FID."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(each)}" for key, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "/")


def _licenses(name: str, params: Params | None) -> str:
    data = "its training images"
    autoencoder = "its origin"
    if params is not None:
        own = params.data.source in ("folder", "tar")
        data = f"the images under `{params.data.root}`" if own else f"the images of `data.source: {params.data.source}`"
        pretrained = params.autoencoder.model_dump().get("pretrained")
        autoencoder = f"`{pretrained}`, its origin" if pretrained else f"{data}, on which it was trained"
        if params.autoencoder.decoder:
            autoencoder += f" ({params.autoencoder.decoder}: `vae/LICENSE`)"
    imported = json_value(paths.model(name) / "config.json", "provenance", "imported")
    origin = "those of its origin: it was imported" if imported else f"those of {data}, and of whoever trained it"
    return "\n".join(
        [
            "| part | terms |",
            "| --- | --- |",
            "| code in this folder | MIT License, of afm-pipe |",
            f"| weights of the generator | {origin} |",
            f"| autoencoder (`vae/`) | those of {autoencoder} |",
        ]
    )
