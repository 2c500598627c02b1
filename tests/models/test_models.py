"""The networks against the released implementation's numbers, and against the paper's parameter counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.generator import Generator
from afm_pipe.models.model_files import (
    ModelConfig,
    build_discriminator,
    build_generator,
    count_parameters,
    load_generator,
    save_model,
    save_tensors,
)
from afm_pipe.params.sizes import ModelSize
from afm_pipe.runtime.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = ModelSize(depth=2, width=32, heads=4, patch=2)
TINY = ModelConfig(size="t4", channels=4, latent_size=8, num_classes=10)

NETWORKS = {
    "generator_1nfe": lambda: Generator(SMALL, 4, 8, 10),
    "generator_multistep": lambda: Generator(SMALL, 4, 8, 10, times="source"),
    "generator_anystep": lambda: Generator(SMALL, 4, 8, 10, times="both"),
    "generator_deep2": lambda: Generator(SMALL, 4, 8, 10, repeats=2),
    "generator_deep4": lambda: Generator(SMALL, 4, 8, 10, repeats=4),
    "discriminator_1nfe": lambda: Discriminator(SMALL, 4, 8, 10),
    "discriminator_multistep": lambda: Discriminator(SMALL, 4, 8, 10, time_conditioned=True),
}


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in file.items()}


@pytest.mark.usefixtures("released_rates")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_equals_the_released_implementation(name: str, dtype: torch.dtype, tolerance: float) -> None:
    vectors = golden(name)
    network = NETWORKS[name]()
    network.load_state_dict({key[8:]: value for key, value in vectors.items() if key.startswith("weights/")})
    times = {key: vectors[key].to(dtype) for key in ("s", "t") if key in vectors}
    out = network.to(dtype)(vectors["x"].to(dtype), vectors["labels"], **times)
    assert (out - vectors["out"]).norm() / vectors["out"].norm() < tolerance


@pytest.mark.usefixtures("released_rates")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_classifier_forward_equals_the_released_implementation(dtype: torch.dtype, tolerance: float) -> None:
    vectors = golden("classifier")
    classifier = LatentClassifier(SMALL, 4, 8, 10)
    classifier.load_state_dict({key[8:]: value for key, value in vectors.items() if key.startswith("weights/")})
    out = classifier.to(dtype)(vectors["x"].to(dtype), vectors["t"].to(dtype))
    assert (out - vectors["out"]).norm() / vectors["out"].norm() < tolerance


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dict_has_the_released_names_and_position_embedding(name: str) -> None:
    weights = {key[8:]: value for key, value in golden(name).items() if key.startswith("weights/")}
    state = NETWORKS[name]().state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in weights.items()}
    assert torch.equal(state["pos_embed"], weights["pos_embed"])


@pytest.mark.parametrize(
    ("size", "nfe", "repeats", "generator_m", "discriminator_m"),
    [
        ("b2", 1, 1, 130, 129),
        ("m2", 1, 1, 306, 304),
        ("l2", 1, 1, 457, 455),
        ("xl2", 1, 1, 673, 671),
        ("xl2", 2, 1, 675, 672),
        ("xl2", 4, 1, 675, 672),
        ("xl2", 1, 2, 675, 671),
        ("xl2", 1, 4, 675, 671),
    ],
)
def test_parameter_counts_are_the_papers(
    size: str, nfe: int, repeats: int, generator_m: int, discriminator_m: int
) -> None:
    config = ModelConfig(size=size, channels=4, latent_size=32, num_classes=1000, nfe=nfe, repeats=repeats)
    with torch.device("meta"):
        counts = count_parameters(build_generator(config)), count_parameters(build_discriminator(config))
    assert tuple(round(count / 1e6) for count in counts) == (generator_m, discriminator_m)


def test_model_folder_gives_back_the_same_generator(tmp_path: Path) -> None:
    generator, discriminator = build_generator(TINY), build_discriminator(TINY)
    torch.nn.init.normal_(generator.final_layer.linear.weight)
    save_model(tmp_path / "m", {"generator": generator, "discriminator": discriminator}, {"model": TINY.model_dump()})
    z, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 3, 9])
    with torch.no_grad():
        assert torch.equal(load_generator(tmp_path / "m", torch.device("cpu"))(z, labels), generator(z, labels))


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    generator, discriminator = build_generator(TINY), build_discriminator(TINY)
    save_model(
        tmp_path / "m",
        {"generator": generator, "discriminator": discriminator},
        {"model": TINY.model_dump() | {"num_classes": 7}},
    )
    with pytest.raises(UserError, match=r"y_embedder.embedding_table.weight of shape \(10, 128\), expected \(7, 128\)"):
        load_generator(tmp_path / "m", torch.device("cpu"))
    tensors = generator.state_dict()
    tensors.pop("pos_embed")
    save_tensors(tmp_path / "m" / "generator.safetensors", tensors)
    with pytest.raises(UserError, match="missing pos_embed"):
        load_generator(tmp_path / "m", torch.device("cpu"))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    networks = {"generator": build_generator(TINY), "discriminator": build_discriminator(TINY)}
    save_model(tmp_path / "m", networks, {"model": TINY.model_dump()})
    weights = tmp_path / "m" / "generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="missing or damaged"):
        load_generator(tmp_path / "m", torch.device("cpu"))


@pytest.mark.slow
def test_forward_of_112_layers() -> None:
    config = ModelConfig(size="xl2", channels=4, latent_size=32, num_classes=1000, repeats=4)
    with torch.no_grad():
        generator = build_generator(config)
        out = generator(torch.randn(1, 4, 32, 32), torch.tensor([7]))
    assert out.shape == (1, 4, 32, 32)
    assert out.isfinite().all()
