"""Fresh networks start as the release's do: mean, deviation and bounds of every tensor, at B/2."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator
from afm_pipe.params.sizes import SIZES

WIDTH, CLASSES = SIZES["b2"].width, 10
FORMS = {
    "one step": {},
    "two steps": {"nfe": 2, "form": "residual"},
    "any step": {"nfe": "any", "form": "residual"},
    "deep": {"repeats": 2},
}


def normal(x: Tensor) -> None:
    assert x.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(x.mean().item()) < 5 * 0.02 / math.sqrt(x.numel())


def zero(x: Tensor) -> None:
    assert not x.any()


def uniform(bound: float) -> Callable[[Tensor], None]:
    def check(x: Tensor) -> None:
        assert x.abs().max().item() <= bound
        assert x.abs().max().item() > 0.9 * bound
        if x.numel() > 500:
            assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)

    return check


def xavier(x: Tensor) -> None:
    outputs, inputs = x.shape[0], x[0].numel()
    uniform(math.sqrt(6 / (inputs + outputs)))(x)


RULES = [
    (r"pos_embed", lambda x: None),  # fixed sines and cosines
    (r"dis_embed|cls_embed", normal),
    (r"y_embedder\.embedding_table\.weight", normal),
    (r"t_tgt_embedder\.mlp\.0\.bias", uniform(1 / math.sqrt(256))),
    (r"t_tgt_embedder\.mlp\.2\.bias", uniform(1 / math.sqrt(WIDTH))),
    (r"t_(tgt_)?embedder\.mlp\.\d\.weight", normal),
    (r".*adaLN_modulation\.1\.(weight|bias)", zero),
    (r"final_layer\.linear\.(weight|bias)", zero),
    (r"final_layer\.1\.(weight|bias)", uniform(1 / math.sqrt(WIDTH))),  # the heads of D and of the classifier
    (r".*\.bias", zero),
    (r".*\.weight", xavier),
]


def check(network: nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        rule = next(rule for pattern, rule in RULES if re.fullmatch(pattern, name))
        try:
            rule(tensor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_generator_starts_as_the_releases(form: str) -> None:
    config = ModelConfig(size="b2", channels=4, latent_size=8, num_classes=CLASSES, **FORMS[form])
    check(build_generator(config))


@pytest.mark.parametrize("form", ["one step", "two steps"])
def test_a_fresh_discriminator_starts_as_the_releases(form: str) -> None:
    config = ModelConfig(size="b2", channels=4, latent_size=8, num_classes=CLASSES, **FORMS[form])
    discriminator = build_discriminator(config)
    check(discriminator)
    assert "final_layer.1.bias" not in discriminator.state_dict()


def test_a_fresh_classifier_starts_as_the_releases() -> None:
    check(LatentClassifier(SIZES["b2"], 4, 8, CLASSES))
