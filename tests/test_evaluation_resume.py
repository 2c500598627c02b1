"""An evaluation that is killed goes on; images kept; the npz for ADM's evaluator; ADM's statistics."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afm_pipe.evaluation.adm import adm_path, adm_references
from afm_pipe.evaluation.features import LEGACY, SPATIAL, FeatureNetwork, load_network
from afm_pipe.evaluation.metrics import evaluate_run
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.params import AdmReference
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.generate import labels_for, stream_images
from afm_pipe.sampling.image_writers import PngFolder, ShuffledNpz
from tests.test_evaluation import Painter, evaluate, params_with, real, reference, vae  # noqa: F401 (fixtures)

SCRIPT = """
import sys, time, torch
from pathlib import Path
from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.evaluation.metrics import evaluate_run
from tests.test_evaluation import Painter, params_with

class Slow(Painter):
    def sample(self, x, labels):
        time.sleep(0.2)
        return super().sample(x, labels)

vae = KLAutoencoder.load(params_with(), Path(sys.argv[1]))
run = evaluate_run(params_with(), Slow(), vae, Path(sys.argv[2]), {}, work_dir=Path(sys.argv[3]), checkpoint_seconds=0)
for tick in run:
    print(tick.done, flush=True)
"""


def test_a_killed_evaluation_goes_on_and_gives_the_same_numbers(
    vae: Any,  # noqa: F811
    reference: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    vae.save(tmp_path / "vae")
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "vae"), str(reference), str(tmp_path / "work")]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 80:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL

    asked = []

    class Counting(Painter):
        def sample(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            asked.append(len(x))
            return super().sample(x, labels)

    run = evaluate_run(params_with(), Counting(), vae, reference, {"run": "painter"}, work_dir=tmp_path / "work")
    metrics, picture = track("evaluate", run)
    whole, whole_picture = track("evaluate", evaluate_run(params_with(), Painter(), vae, reference, {"run": "painter"}))
    assert metrics == whole and picture.tobytes() == whole_picture.tobytes()
    assert sum(asked) <= 240 - 80  # what was measured before the kill was not generated again


def test_intervals_stand_beside_every_distance_and_share(vae: Any, reference: Path) -> None:  # noqa: F811
    metrics = evaluate(Painter(spread=0.7), vae, reference)
    keys = ("fd_classifier_240", "kid_classifier_240", "precision_classifier_240", "recall_classifier_240")
    assert metrics["intervals"].keys() == {*keys, "class_accuracy"}
    for key, (low, high) in metrics["intervals"].items():
        assert low <= metrics[key] <= high and low < high
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics["protocol"]["reference"] == {"classifier": "training images"}


def test_a_narrow_generator_is_precise_and_recalls_little(vae: Any, reference: Path) -> None:  # noqa: F811
    narrow, right = (evaluate(Painter(spread=spread), vae, reference) for spread in (0.05, 0.5))
    assert narrow["recall_classifier_240"] < 0.5 * right["recall_classifier_240"]
    assert right["precision_classifier_240"] > 0.6


def test_our_distances_are_clean_fids_on_a_folder_of_the_same_images(
    vae: Any,  # noqa: F811
    reference: Path,  # noqa: F811
    real: tuple[np.ndarray, np.ndarray],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Its folder of PNG files against our stream: quantisation, features and formula at once."""
    from cleanfid import fid

    folders = tmp_path / "samples", tmp_path / "real"
    files = PngFolder(folders[0])
    for _, _, images in stream_images(Painter(spread=0.8), vae, params_with(), 2000, 240, 3):
        files.add(images)
    PngFolder(folders[1]).add(torch.from_numpy(real[0]))
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


def test_the_npz_for_adms_evaluator_is_shuffled_with_its_labels(tmp_path: Path) -> None:
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 1, 4, 4)
    labels = labels_for(range(60), 7).tolist()
    for name in ("a", "b"):
        file = ShuffledNpz(tmp_path / f"{name}.npz", labels, seed=5)
        for batch in images.split(25):
            file.add(batch)
        file.finish()
        file.close()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        pixels, order = found["arr_0"], found["arr_0"][:, 0, 0, 0]
        assert pixels.shape == (60, 4, 4, 3) and pixels.dtype == np.uint8
        assert sorted(order) == list(range(60)) and (order != np.arange(60)).any()
        assert (found["arr_1"] == order % 7).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_adms_statistics_take_the_place_of_ours_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    random, spread = np.random.default_rng(0), np.eye(5)
    arrays = {"mu": random.normal(size=5), "sigma": spread, "mu_s": random.normal(size=5), "sigma_s": 2 * spread}
    batch = random.integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=batch, **arrays)
    sha256 = sha256_file(tmp_path / "adm.npz")
    networks = [
        FeatureNetwork(name, 5, "0" * 64, lambda x: x.flatten(1)[:, :5].float())
        for name in ("classifier", LEGACY, SPATIAL)
    ]
    ours = [
        Reference(n.name, n.sha256, "digest", 9, np.zeros(5), spread, np.zeros((9, 5), np.float32), np.arange(9), 1.0)
        for n in networks
    ]
    kept, pooled, spatial = adm_references(AdmReference(file="adm.npz", sha256=sha256), networks, ours, 10)
    assert kept is ours[0] and kept.source == "training images"
    assert pooled.source == spatial.source == f"adm {sha256}"
    assert (pooled.mu == arrays["mu"]).all() and (spatial.mu == arrays["mu_s"]).all()
    assert (spatial.sigma == 2 * spread).all() and pooled.digest != ours[1].digest
    assert (pooled.features == batch.transpose(0, 3, 1, 2).reshape(23, -1)[:, :5]).all()
    with pytest.raises(UserError, match="with sha256 .*adm_reference.sha256"):
        adm_path(AdmReference(file="adm.npz", sha256="1" * 64))
    with pytest.raises(UserError, match="Found no .*gone.npz"):
        adm_path(AdmReference(file="gone.npz", sha256=None))
    np.savez(tmp_path / "half.npz", arr_0=batch)
    with pytest.raises(UserError, match="expected arrays mu, sigma"):
        list(adm_references(AdmReference(file="half.npz", sha256=None), networks, ours, 10))
    np.savez(tmp_path / "wide.npz", arr_0=batch, **(arrays | {"mu": np.zeros(6)}))
    with pytest.raises(UserError, match=r"Found mean \(6,\)"):
        list(adm_references(AdmReference(file="wide.npz", sha256=None), networks, ours, 10))
