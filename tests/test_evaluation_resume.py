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
from PIL import Image

from afm_pipe.console import follow
from afm_pipe.errors import UserError
from afm_pipe.evaluation.metrics import evaluate_run
from afm_pipe.image_files import PngFolder, ShuffledNpz
from afm_pipe.sampling import labels_for
from tests.test_evaluation import Painter, evaluate, params_with, real, reference, vae  # noqa: F401 (fixtures)

SCRIPT = """
import sys, time, torch
from pathlib import Path
from diffusers import AutoencoderKL
from afm_pipe.evaluation.metrics import evaluate_run
from tests.test_evaluation import Painter, params_with

class Slow(Painter):
    def sample(self, x, labels):
        time.sleep(0.2)
        return super().sample(x, labels)

vae = AutoencoderKL.from_pretrained(sys.argv[1], low_cpu_mem_usage=False).eval()
run = evaluate_run(params_with(), Slow(), vae, Path(sys.argv[2]), {}, work_dir=Path(sys.argv[3]), checkpoint_seconds=0)
for tick in run:
    print(tick.done, flush=True)
"""


def test_a_killed_evaluation_goes_on_and_gives_the_same_numbers(
    vae: Any,  # noqa: F811
    reference: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    vae.save_pretrained(tmp_path / "vae")
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
    metrics, picture = follow("evaluate", run)
    whole, whole_picture = follow(
        "evaluate", evaluate_run(params_with(), Painter(), vae, reference, {"run": "painter"})
    )
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


def test_kept_images_are_the_pixels_that_were_measured(
    vae: Any,  # noqa: F811
    reference: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    params = params_with(evaluate={"samples": 42})
    measured = []

    class Keep(PngFolder):
        def add(self, images: torch.Tensor) -> None:
            measured.append(images)
            super().add(images)

    follow("e", evaluate_run(params, Painter(), vae, reference, {}, keep=Keep(tmp_path / "images")))
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(42)]
    back = np.stack([np.asarray(Image.open(file)) for file in files])
    assert (back == torch.cat(measured)[:, 0].numpy()).all()


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


def test_an_evaluation_wants_the_reference_its_params_name(vae: Any, reference: Path) -> None:  # noqa: F811
    from afm_pipe.evaluation.adm import adm_path
    from afm_pipe.params import AdmReference

    with pytest.raises(UserError, match="Found no .*gone.npz"):
        adm_path(AdmReference(file="gone.npz", sha256=None))
