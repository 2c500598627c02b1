"""The model card of an export to diffusers: metrics of these weights and no others, protocol, licenses."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.params.file import load_params
from afm_pipe.reporting.model_card import model_card_sections
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import sha256_file, write_json
from tests.conftest import SMOKE
from tests.models.test_released import FORMS, project, trained  # noqa: F401 (fixture)

METRICS = {
    "fd_classifier_5k": 11.825,
    "class_accuracy": 0.987,
    "intervals": {"fd_classifier_5k": [11.18, 12.47]},
    "protocol": {
        "generator_sha256": "g",
        "autoencoder_sha256": "a",
        "samples": 5000,
        "nfe": 1,
        "reference": {"classifier": "training images"},
        "code": {"evaluation": "v1 00000000"},
    },
}


def test_an_export_has_a_card_with_its_metrics_protocol_and_licenses(project: Path) -> None:  # noqa: F811
    trained("t4", FORMS["1nfe"])
    hashes = {
        "generator_sha256": sha256_file(paths.model("t4") / "generator.safetensors"),
        "autoencoder_sha256": sha256_file(paths.AUTOENCODER_WEIGHTS),
    }
    write_json(paths.metrics("t4"), METRICS | {"protocol": METRICS["protocol"] | hashes})  # type: ignore[operator]
    Path("params.yaml").write_text(SMOKE.read_text())
    done = CliRunner().invoke(app, ["export", "t4", "--format", "diffusers", "--out", "out"])
    assert done.exit_code == 0, done.output
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "| FD-5k (classifier) | 11.8 | 11.2, 12.5 | lower | Fréchet distance between" in card
    assert "| Class accuracy | 98.7 % | – | higher |" in card
    assert "| samples | 5,000 |" in card and "| compared with | classifier: training images |" in card
    assert "| code in this folder | MIT License, of afm-pipe |" in card
    assert "those of the images of `data.source: mnist5k`" in card


@pytest.mark.parametrize("hashes", [("other", "a"), ("g", "other")])
def test_metrics_of_other_weights_are_not_shown(hashes: tuple[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(paths.metrics("t4"), METRICS)
    text = model_card_sections("t4", *hashes, None)
    assert "is of other weights, so no metrics are shown" in text and "11.8" not in text
    assert "11.8" in model_card_sections("t4", "g", "a", None)


def test_a_model_that_was_not_measured_or_came_from_elsewhere_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(paths.model("t4") / "config.json", {"provenance": {"imported": {"entry": "ema"}}})
    own = (
        "data.source=folder",
        "data.root=photos",
        "autoencoder.pretrained=some/vae",
        "autoencoder.sha256=" + "a0" * 32,
    )
    params = load_params(SMOKE, [*own, "autoencoder.train=null", "autoencoder.scaling_factor=0.18215"])
    text = model_card_sections("t4", "g", "a", params)
    assert "This model was not measured before it was exported." in text
    assert "those of its origin: it was imported" in text and "those of `some/vae`, its origin" in text
