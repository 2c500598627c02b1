"""A killed evaluation resumes; intervals; agreement with clean-fid on files."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.image_writers import PngWriter
from afm_pipe.sampling.sampler import balanced_labels
from tests.conftest import ROOT
from tests.evaluation.painter import Painter, evaluate, load_network, params_with, sampler_of

SCRIPT = """
import sys, time, torch
from pathlib import Path
from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.evaluation.evaluator import Evaluator
from tests.evaluation.painter import Painter, params_with, sampler_of

class Slow(Painter):
    def sample(self, x, labels, steps):
        time.sleep(0.2)
        return super().sample(x, labels)

vae = KLAutoencoder.load(params_with(), Path(sys.argv[1]))
run = Evaluator(params_with(), Path(sys.argv[2])).evaluate(sampler_of(Slow(), vae), {}, Path(sys.argv[3]), 0)
for tick in run:
    print(tick.done, flush=True)
"""


def test_killed_evaluation_resumes_to_the_same_numbers(
    vae: Any,
    reference: Path,
    tmp_path: Path,
) -> None:
    vae.save(tmp_path / "vae")
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "vae"), str(reference), str(tmp_path / "work")]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 80:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL

    generated = []

    class Counting(Painter):
        def sample(self, x: torch.Tensor, labels: torch.Tensor, steps: int | None = None) -> torch.Tensor:
            generated.append(len(x))
            return super().sample(x, labels)

    evaluator = Evaluator(params_with(), reference)
    resumed = track("evaluate", evaluator.evaluate(sampler_of(Counting(), vae), {}, tmp_path / "work"))
    whole = track("evaluate", evaluator.evaluate(sampler_of(Painter(), vae), {}))
    assert resumed is not None and resumed == whole
    assert sum(generated) <= 240 - 80  # what was measured before the kill was not generated again


def test_every_distance_and_fraction_has_an_interval(vae: Any, reference: Path) -> None:
    metrics = evaluate(Painter(spread=0.7), vae, reference)
    keys = ("fd_classifier_240", "kid_classifier_240", "precision_classifier_240", "recall_classifier_240")
    assert metrics["intervals"].keys() == {*keys, "sw_classifier_240", "class_accuracy"}
    for key, (low, high) in metrics["intervals"].items():
        assert low <= metrics[key] <= high and low < high
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["protocol"]["reference"] == {"classifier": "training images"}


def test_narrow_generator_has_precision_without_recall(vae: Any, reference: Path) -> None:
    narrow, right = (evaluate(Painter(spread=spread), vae, reference) for spread in (0.05, 0.5))
    assert narrow["recall_classifier_240"] < 0.5 * right["recall_classifier_240"]
    assert right["precision_classifier_240"] > 0.6


def test_distances_equal_clean_fids_on_a_folder_of_the_same_images(
    vae: Any,
    reference: Path,
    real: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    """Compares quantization, features and formula at once: its PNG files with our stream."""
    from cleanfid import fid

    folders = tmp_path / "samples", tmp_path / "real"
    files = PngWriter(folders[0])
    for images in sampler_of(Painter(spread=0.8), vae).stream(balanced_labels(range(240), 3), 2000):
        files.add(images)
    PngWriter(folders[1]).add(torch.from_numpy(real[0]))
    network = load_network("classifier", reference)

    def extract(batch: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) in [0, 255]
        assert (batch == batch.round()).all()
        return network(batch[:, :1].to(torch.uint8))

    given: dict[str, Any] = {"num_workers": 0, "device": torch.device("cpu"), "verbose": False}
    features = [
        fid.get_folder_features(str(folder), extract, custom_fn_resize=lambda x: x, **given) for folder in folders
    ]
    metrics = evaluate(Painter(spread=0.8), vae, reference)
    try:
        expected = fid.fid_from_feats(*(each.astype(np.float64) for each in features))
    except TypeError:
        pytest.skip("this scipy has no sqrtm(disp=), which clean-fid's formula calls")
    assert metrics["fd_classifier_240"] == pytest.approx(expected, rel=1e-6)
