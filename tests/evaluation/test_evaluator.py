"""The reference of the real images, and what is measured of a generator against it.

The real images here are samples of a known generator: the tests evaluate the perfect generator, one that copies, one
that ignores its noise, and one that mixes up classes.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.evaluation.distance import SampleDistance
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.networks import FeatureNetwork
from afm_pipe.evaluation.reference import build_reference
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.evaluation.thumbnails import Neighbors, Thumbnails, build_thumbnails, thumbnail
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.evaluation.painter import (
    CLASSES,
    REAL_SEED,
    Painter,
    evaluate,
    load_network,
    manifest_of,
    params_with,
    sampler_of,
)


def global_numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return [*state[1], state[2]]


def test_reference_writes_its_files(reference: Path, real: tuple[np.ndarray, np.ndarray]) -> None:
    assert {path.name for path in reference.iterdir()} == {
        "classifier.npz",
        "classifier.safetensors",
        "classifier.json",
        "thumbnails.npz",
        "summary.json",
        "real.png",
        "reconstructed.png",
    }
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["images"] == 300 and summary["classes"] == CLASSES and summary["manifest"] == "digest"
    assert summary["classifier_accuracy"] > 0.9
    assert summary["fd_classifier_reconstruction"] > 0 and summary["kid_classifier_reconstruction"] > 0
    network = load_network("classifier", reference)
    found = Reference.load(reference, network)
    features = network(torch.from_numpy(real[0])).numpy()
    np.testing.assert_allclose(found.features, features, atol=1e-5)
    np.testing.assert_allclose(found.mu, features.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), atol=1e-4)
    assert (found.labels == real[1]).all() and found.count == 300
    assert summary["within_class_variance"] == found.within_class_variance


def test_reference_pictures_hold_a_class_per_row(reference: Path, real: tuple[np.ndarray, np.ndarray]) -> None:
    pictures = [np.asarray(Image.open(reference / name)) for name in ("real.png", "reconstructed.png")]
    assert pictures[0].shape == pictures[1].shape == (2 + 3 * 18, 2 + 4 * 18)
    second_row = np.flatnonzero(real[1] == 1)
    assert (pictures[0][20:36, 2:18] == real[0][second_row[0], 0]).all()


def test_reference_is_deterministic(
    reference: Path, real: tuple[np.ndarray, np.ndarray], vae: Any, tmp_path: Path
) -> None:
    track("reference", build_reference(params_with(), manifest_of(real[1]), real[0], vae, tmp_path))
    for path in reference.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_thumbnails_are_spread_evenly_over_classes(reference: Path) -> None:
    thumbnails = Thumbnails.load(reference / "thumbnails.npz")
    assert thumbnails.images.shape == (200, 1, 16, 16)
    assert sorted(np.bincount(thumbnails.labels)) == [66, 67, 67]


def test_reference_refuses_images_of_another_size(
    real: tuple[np.ndarray, np.ndarray], vae: Any, tmp_path: Path
) -> None:
    images, labels = real
    with pytest.raises(UserError, match="data.image_size"):
        track("r", build_reference(params_with(), manifest_of(labels), images[..., :8], vae, tmp_path))
    with pytest.raises(UserError, match="labels"):
        track("r", build_reference(params_with(), manifest_of(labels[:-1]), images, vae, tmp_path))


def test_missing_inception_is_an_error_before_anything_is_built(
    real: tuple[np.ndarray, np.ndarray], vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path / "weights"))
    params = params_with(evaluate={"features": ["classifier", "inception_clean"]})
    with pytest.raises(UserError, match="inception-2015-12-05.pt"):
        next(build_reference(params, manifest_of(real[1]), real[0], vae, tmp_path / "reference"))


def test_perfect_generator_scores_well_and_copies_nothing(vae: Any, reference: Path) -> None:
    metrics = evaluate(Painter(), vae, reference)
    worse = evaluate(Painter(spread=2.0), vae, reference)
    floor = json.loads((reference / "summary.json").read_text())["fd_classifier_reconstruction"]
    assert metrics["fd_classifier_240"] < 0.2 * min(worse["fd_classifier_240"], floor)
    assert abs(metrics["kid_classifier_240"]) < 0.3 * worse["kid_classifier_240"]
    assert metrics["class_accuracy"] > 0.9
    assert 0.7 < metrics["within_class_variance"] < 1.4 < worse["within_class_variance"]
    assert metrics["copies"] < 0.02
    assert 0.8 < metrics["nearest_distance_ratio"] < 1.2


def test_copies_are_detected(vae: Any, reference: Path) -> None:
    # The seed of the real images gives those very images again; the first 198 of them are among the thumbnails.
    metrics = evaluate(Painter(), vae, reference, evaluate={"seed": REAL_SEED, "samples": 198})
    assert metrics["copies"] == 1
    assert metrics["nearest_distance_ratio"] == 0


def test_generator_that_ignores_its_noise_has_no_variance(vae: Any, reference: Path) -> None:
    metrics = evaluate(Painter(spread=0), vae, reference)
    assert metrics["within_class_variance"] < 0.01
    assert metrics["class_accuracy"] > 0.9
    assert metrics["copies"] < 0.02  # a mean is near to many training images, and a copy of none


def test_mixed_up_classes_show_in_accuracy_alone(vae: Any, reference: Path) -> None:
    right, wrong = (evaluate(Painter(shift=shift), vae, reference) for shift in (0, 1))
    assert wrong["class_accuracy"] < 0.1
    assert wrong["fd_classifier_240"] < 5 * right["fd_classifier_240"] + 0.1


def test_protocol_is_recorded_with_the_metrics(vae: Any, reference: Path) -> None:
    protocol = evaluate(Painter(), vae, reference)["protocol"]
    assert protocol["run"] == "painter" and protocol["samples"] == 240 and protocol["seed"] == 2000
    assert protocol["features"] == {"classifier": load_network("classifier", reference).sha256}
    assert protocol["reference_images"] == 300 and protocol["reference_manifest"] == "digest"
    assert json.loads(json.dumps(protocol, allow_nan=False)) == protocol


def test_evaluation_is_repeatable_and_leaves_global_random_states_alone(vae: Any, reference: Path) -> None:
    torch_before, numpy_before = torch.get_rng_state(), global_numpy_state()
    assert evaluate(Painter(), vae, reference) == evaluate(Painter(), vae, reference)
    assert torch.equal(torch_before, torch.get_rng_state()) and numpy_before == global_numpy_state()


def test_picture_shows_samples_above_their_nearest_training_images(vae: Any, reference: Path) -> None:
    params = params_with(evaluate={"seed": REAL_SEED})
    pixels = np.asarray(Evaluator(params, reference).nearest(sampler_of(Painter(), vae)))
    assert pixels.shape == (2 + 4 * 18, 2 + 10 * 18)
    assert (pixels[2:18] == pixels[20:36]).all()  # copies: the nearest training image is the sample itself
    assert not (pixels[20:36] == pixels[38:54]).all()


def test_fewer_samples_than_two_a_class_are_refused(vae: Any, reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    many = reference.parent / "many"
    many.mkdir(exist_ok=True)
    (many / "summary.json").write_text(json.dumps(summary | {"classes": [str(i) for i in range(200)]}))
    with pytest.raises(UserError, match="evaluate.samples 240, expected at least 2 of each of 200 classes"):
        evaluate(Painter(), vae, many)


def test_a_generator_of_other_classes_is_refused(vae: Any, reference: Path) -> None:
    evaluator = Evaluator(params_with(), reference)
    for names in (["ant", "bee", "dog"], ["bee", "ant", "cow"], ["ant", "bee"], ["0", "1", "2"]):
        other = replace(sampler_of(Painter(), vae), class_names=names)
        with pytest.raises(UserError, match=f"in model painter.*expected .* of 3 as in {reference}/summary.json"):
            next(evaluator.evaluate(other, {"run": "painter"}))
        with pytest.raises(UserError, match=f"in the latents.*expected .* of 3 as in {reference}/summary.json"):
            SampleDistance(params_with(), reference, vae, names, 30, torch.device("cpu"))


def test_reference_of_images_of_another_size_is_refused(vae: Any, reference: Path) -> None:
    with pytest.raises(UserError, match="build the reference again"):
        evaluate(Painter(), vae, reference, data={"image_size": 32})


def test_samples_of_another_size_are_refused(reference: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    other = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=8, **blocks)
    with pytest.raises(UserError, match=r"Found samples of shape \[1, 8, 8\], expected \[1, 16, 16\]"):
        evaluate(Painter(), KLAutoencoder(other, 8), reference)


def test_non_finite_latents_are_refused(vae: Any, reference: Path) -> None:
    with pytest.raises(UserError, match="non-finite latent"):
        evaluate(Painter(spread=float("nan")), vae, reference)


def test_statistics_of_another_network_or_mode_are_refused(reference: Path) -> None:
    network = load_network("classifier", reference)
    Reference.load(reference, network)

    def other(**changes: Any) -> FeatureNetwork:
        return FeatureNetwork(**(vars(network) | changes))

    with pytest.raises(UserError, match="sha256"):
        Reference.load(reference, other(sha256="0" * 64))
    with pytest.raises(UserError, match="Found no .*inception_clean.npz"):
        Reference.load(reference, other(name="inception_clean"))
    (reference.parent / "inception_clean.npz").write_bytes((reference / "classifier.npz").read_bytes())
    with pytest.raises(UserError, match="of network classifier, expected inception_clean"):
        Reference.load(reference.parent, other(name="inception_clean"))


@pytest.mark.parametrize("content", [b"", b"not an archive", None], ids=["empty", "text", "truncated"])
def test_damaged_statistics_are_a_clear_error(reference: Path, tmp_path: Path, content: bytes | None) -> None:
    network = load_network("classifier", reference)
    whole = (reference / "classifier.npz").read_bytes()
    (tmp_path / "classifier.npz").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="build the reference again"):
        Reference.load(tmp_path, network)


def test_statistics_with_pickles_are_refused(reference: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(reference / "classifier.npz"))
    np.savez(tmp_path / "classifier.npz", **(arrays | {"labels": np.array([{}], dtype=object)}))
    with pytest.raises(UserError, match="unreadable"):
        Reference.load(tmp_path, load_network("classifier", reference))


def test_nearest_images_equal_a_search_of_every_pair() -> None:
    random = np.random.default_rng(0)
    training, images = (random.integers(0, 256, (count, 3, 8, 8)).astype(np.uint8) for count in (50, 7))
    images[2] = training[31]
    distances, indices = Neighbors(torch.from_numpy(training)).nearest(torch.from_numpy(images), 3)
    apart = (images[:, None] / 255 - training[None] / 255).reshape(7, 50, -1)
    every = np.linalg.norm(apart, axis=2)
    assert (indices.numpy() == every.argsort(axis=1)[:, :3]).all()
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :3], rtol=1e-5)
    assert distances[2, 0] == 0 and indices[2, 0] == 31


def some_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def test_nearest_other_is_never_the_image_itself_and_zero_for_a_duplicate() -> None:
    images = some_images(20)
    images[5] = images[11]
    images[2:5] = images[1].clone()
    thumbnails = build_thumbnails(images, np.zeros(20, np.int64))
    assert np.flatnonzero(thumbnails.nearest_other == 0).tolist() == [1, 2, 3, 4, 5, 11]
    assert thumbnails.copy_ratio > 0.5  # duplicates do not hide copies
    with pytest.raises(UserError, match="at least 3"):
        build_thumbnails(images[:2], np.zeros(2, np.int64))


def test_near_copies_are_distinguished_from_means_and_new_images() -> None:
    images = some_images(300)
    training, new = images[:200], images[200:]
    thumbnails = build_thumbnails(training, np.zeros(200, np.int64))
    search = Neighbors(training)
    near_copies = training + torch.randint(0, 20, training.shape, dtype=torch.uint8)
    means = (training[:100].float() + training[100:].float()).div(2).to(torch.uint8)
    shares = [thumbnails.copied(search.nearest(other, 3)[0]).mean() for other in (training, near_copies, means, new)]
    assert shares[0] == shares[1] == 1 and shares[2] == 0 and shares[3] < 0.05


@pytest.mark.parametrize(("side", "expected"), [(16, 16), (32, 32), (64, 32), (100, 32)])
def test_thumbnails_are_small_and_keep_the_mean(side: int, expected: int) -> None:
    images = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    small = thumbnail(images)
    assert small.shape == (2, 3, expected, expected) and small.dtype == torch.uint8
    assert abs(small.float().mean() - images.float().mean()) < 2
