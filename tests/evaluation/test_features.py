"""Feature networks: the classifier of the reference, and Inception from a file of the user's."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afm_pipe.evaluation.classifier import WEIGHTS, Classifier, load_classifier, save_classifier, train_classifier
from afm_pipe.evaluation.features import INCEPTION_FILE, dinov2_path, inception_path, load_networks
from afm_pipe.evaluation.inception import _resized
from afm_pipe.evaluation.networks import METRIC_NAMES, FeatureNetwork
from afm_pipe.params import FeatureClassifier
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.evaluation.painter import load_network, params_with

SETTINGS = FeatureClassifier(widths=(4, 8), features=6, lr=1e-2, batch_size=16, epochs=6, held_out=0.2)


def striped(channels: int = 1, side: int = 12, per_class: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy images of three classes, bright at the top, in the middle or at the bottom, and their labels."""
    labels = np.repeat(np.arange(3), per_class)
    images = np.random.default_rng(0).integers(0, 90, (3 * per_class, channels, side, side))
    third = side // 3
    for label in range(3):
        images[labels == label, :, label * third : (label + 1) * third] += 120
    return images.astype(np.uint8), labels


def trained(channels: int = 1, side: int = 12, seed: int = 0) -> tuple[Classifier, float]:
    images, labels = striped(channels, side)
    return track("classifier", train_classifier(SETTINGS, images, labels, 3, seed))


@pytest.mark.parametrize(("channels", "side"), [(1, 12), (3, 27), (1, 8)])
def test_classifier_learns_images_of_any_size_and_color(channels: int, side: int) -> None:
    assert trained(channels, side)[1] >= 0.95


def test_classifier_is_the_same_for_the_same_seed_and_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (trained(seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_accuracy_is_of_images_never_trained_on() -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (200, 1, 8, 8)).astype(np.uint8), np.arange(200) % 2
    large = SETTINGS.model_copy(update={"widths": (32, 64), "features": 64, "epochs": 60})
    model, accuracy = track("classifier", train_classifier(large, images, labels, 2, 0))
    of_all = (model(torch.from_numpy(images)).argmax(dim=1).numpy() == labels).mean()
    assert accuracy < 0.75 < of_all  # labels mean nothing here: it learns by heart what it sees, and guesses the rest


def test_one_image_a_class_leaves_none_to_measure_on() -> None:
    with pytest.raises(UserError, match="at least 2 in some class"):
        track("classifier", train_classifier(SETTINGS, np.zeros((3, 1, 8, 8), np.uint8), np.arange(3), 3, 0))


def test_saved_classifier_gives_the_same_features_and_classes(tmp_path: Path) -> None:
    model, _ = trained()
    save_classifier(model, tmp_path)
    network = load_network("classifier", tmp_path)
    images = torch.from_numpy(striped()[0])
    features = network(images)
    assert features.dtype == torch.float32 and features.shape == (120, 6) and network.dim == 6
    with torch.no_grad():
        assert torch.equal(features, model.features(images))
        assert torch.equal(network.predict(features), model(images).argmax(dim=1))


def test_networks_differ_by_hash(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_classifier(trained(seed=seed)[0], tmp_path / str(seed))
    first, second = (load_network("classifier", tmp_path / str(seed)).sha256 for seed in (0, 1))
    assert first != second == load_network("classifier", tmp_path / "1").sha256


def test_classifier_refuses_images_of_other_channels(tmp_path: Path) -> None:
    save_classifier(trained()[0], tmp_path)
    with pytest.raises(UserError, match="3 channels, expected 1"):
        load_network("classifier", tmp_path)(torch.zeros(2, 3, 12, 12, dtype=torch.uint8))


def test_missing_or_truncated_classifier_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Found no"):
        load_classifier(tmp_path)
    save_classifier(trained()[0], tmp_path)
    weights = tmp_path / WEIGHTS
    whole = weights.read_bytes()
    for damaged in (whole[:-10], b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="build the reference again"):
            load_classifier(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="build the reference again"):
        load_classifier(tmp_path)


def test_only_inception_distances_are_called_fid() -> None:
    for name, names in METRIC_NAMES.items():
        assert ("fid" in names.distance) == name.startswith("inception")


class Mixed(nn.Module):
    """A layer whose first branch is `conv`, as mixed_6 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[:, :128]


class Pool(nn.Module):
    """The last layer: 2,048 numbers of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, (4, 4)).flatten(1)


class StandIn(nn.Module):
    """A network with the outside of the Inception file: its resizing, its named layers, its two kinds of answers."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential()
        layers.add_module("conv", nn.AvgPool2d(17, 17))
        layers.add_module("mixed_6", Mixed())
        layers.add_module("pool2", Pool())
        self.layers = layers
        self.output = nn.Linear(2048, 1008)
        self.offset = offset

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        size, (height, width) = img.shape[0], (img.shape[2], img.shape[3])
        theta = torch.eye(2, 3)
        theta[0, 2] += 1 / width - 1 / 299
        theta[1, 2] += 1 / height - 1 / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat([size, 1, 1]), [size, 3, 299, 299], align_corners=False)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).view(size, 2048) + self.offset
        if return_features:
            return features
        if no_output_bias:
            return F.softmax(F.linear(features, self.output.weight), dim=1)
        return F.softmax(self.output(features), dim=1)


@pytest.fixture
def sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the stand-in where Inception belongs; return its hash."""
    return put_inception(StandIn(), tmp_path, monkeypatch)


def put_inception(network: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AFM_WEIGHTS", str(folder))
    path = folder / INCEPTION_FILE
    torch.jit.script(network).save(str(path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("afm_pipe.evaluation.features.INCEPTION_SHA256", sha256)
    return sha256


def load_inception(mode: str) -> FeatureNetwork:
    return load_network(f"inception_{mode}")


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_inception_features_of_gray_equal_those_of_rgb(mode: str, sha256: str) -> None:
    network = load_inception(mode)
    gray = torch.randint(0, 256, (3, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = network(gray)
    assert features.shape == (3, 2048) and features.dtype == torch.float32
    assert torch.equal(features, network(gray.repeat(1, 3, 1, 1)))
    assert not torch.equal(features[0], features[1])
    with pytest.raises(UserError, match="Found no classes"):
        network.predict(features)


def test_clean_features_are_those_of_cleanfid_on_png_files(sha256: str, tmp_path: Path) -> None:
    from cleanfid.fid import get_files_features
    from cleanfid.inception_torchscript import InceptionV3W

    from afm_pipe.sampling.image_writers import grid

    images = torch.randint(0, 256, (4, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for file, image in zip(files, images, strict=True):
        grid(image[None], columns=1, gap=0).save(file)
    for mode in ("clean", "legacy_tensorflow"):
        model = InceptionV3W(str(tmp_path), download=False, resize_inside=mode == "legacy_tensorflow")
        expected = get_files_features(files, model, num_workers=0, device=torch.device("cpu"), mode=mode, verbose=False)
        np.testing.assert_allclose(load_inception(mode)(images).numpy(), expected, atol=1e-5)


def test_clean_and_legacy_features_differ(sha256: str) -> None:
    images = torch.randint(0, 256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    clean, legacy = (load_inception(mode)(images) for mode in ("clean", "legacy_tensorflow"))
    assert (clean - legacy).abs().max() > 0.05 * legacy.abs().max()


def test_one_pass_of_inception_gives_features_spatial_features_and_probabilities(sha256: str, tmp_path: Path) -> None:
    pooled, spatial = load_networks(params_with().evaluate, Path(), names=["inception_legacy_tensorflow"])
    images = torch.randint(0, 256, (3, 3, 40, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    base = torch.jit.load(str(tmp_path / INCEPTION_FILE))
    features = pooled(images)
    with torch.no_grad():
        assert torch.allclose(features, base(images, return_features=True), atol=1e-4)
        assert pooled.probabilities is not None
        assert torch.allclose(pooled.probabilities(features), base(images, no_output_bias=True), atol=1e-4)
    found = spatial(images)
    assert found.shape == (3, 2023) and spatial.dim == 2023 and spatial.name == "inception_spatial"
    layers = dict(base.layers.named_children())
    with torch.no_grad():
        expected = layers["mixed_6"].conv(layers["conv"]((_resized(images.float()) - 128) / 128))  # (3, 192, 17, 17)
    assert torch.allclose(found.view(3, 17, 17, 7)[0, 4, 9], expected[0, :7, 4, 9], atol=1e-5)  # channels stand last


def test_an_inception_with_other_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_inception(StandIn(offset=5.0), tmp_path, monkeypatch)
    with pytest.raises(UserError, match="with other layers .features .* off its own"):
        load_inception("legacy_tensorflow")


def test_efficientnet_takes_gray_and_rgb() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    network = load_network("efficientnet")
    gray = torch.randint(0, 256, (2, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = network(gray)
    assert features.shape == (2, 1280) and features.std() > 0.01
    assert torch.allclose(features, network(gray.repeat(1, 3, 1, 1)))


def test_missing_dinov2_names_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="dinov2_vitl14.safetensors"):
        load_network("dinov2")


def test_dinov2_weights_need_a_hash_in_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    path = tmp_path / "dinov2_vitl14.safetensors"
    path.write_bytes(b"other weights")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("afm_pipe.autoencoders.encoders.load_file", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=f"with sha256 {found}, and evaluate.dinov2_sha256 null: "):
        load_network("dinov2")
    with pytest.raises(UserError, match=f"with sha256 {found}, expected .* sha256 333"):
        dinov2_path("3" * 64)
    assert dinov2_path(found) == path


def test_different_inception_file_is_refused_before_it_is_loaded(
    sha256: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / INCEPTION_FILE
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="Found .*inception.* with sha256 .*expected .*" + sha256) as error:
        load_inception("clean")
    assert str(path) in str(error.value) and "https://" in str(error.value)


def test_missing_inception_file_names_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError) as error:
        inception_path()
    for part in (str(tmp_path / INCEPTION_FILE), "f58cb9b6", "https://", "AFM_WEIGHTS"):
        assert part in str(error.value)
    monkeypatch.delenv("AFM_WEIGHTS")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"Found no weights/{INCEPTION_FILE}"):
        inception_path()
