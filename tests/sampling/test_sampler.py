"""Samples by index do not depend on the other samples of a batch."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.models.flow import Flow
from afm_pipe.models.generator import Generator
from afm_pipe.params.sizes import ModelSize
from afm_pipe.runtime.errors import UserError
from afm_pipe.sampling.sampler import Sampler, balanced_labels, labels_in_shares, seeded_noise

SHAPE = (4, 8, 8)
MICRO_BATCH = 6
CLASSES = 5


@pytest.fixture(scope="module")
def generator() -> nn.Module:
    torch.manual_seed(0)
    model = Generator(ModelSize(depth=2, width=64, heads=4, patch=4), 4, 8, CLASSES)
    with torch.no_grad():  # some weights are initialized to zero
        for weight in model.parameters():
            weight.normal_(std=0.1)
    return Flow(model.eval(), "direct", nfe=1)


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 16, 32), norm_num_groups=8, **blocks)
    return KLAutoencoder(model, SHAPE[1] * 4)


def sampler_of(generator: nn.Module, vae: Any = None) -> Sampler:
    return Sampler(generator, vae, SHAPE, [str(i) for i in range(CLASSES)], MICRO_BATCH)  # type: ignore[arg-type]


def images_of(generator: nn.Module, vae: Any, indices: list[int], seed: int = 3) -> Tensor:
    return sampler_of(generator, vae).images(indices, balanced_labels(indices, CLASSES), seed)


def latents_of(generator: nn.Module, indices: list[int], seed: int = 3) -> Tensor:
    return sampler_of(generator).latents(indices, balanced_labels(indices, CLASSES), seed)


def test_noise_of_an_index_depends_on_seed_plus_index_alone() -> None:
    drawn = seeded_noise(10, [4, 0, 7], SHAPE)
    assert drawn.shape == (3, *SHAPE) and drawn.dtype == torch.float32
    assert torch.equal(drawn[1], torch.randn(SHAPE, generator=torch.Generator().manual_seed(10)))
    assert torch.equal(drawn[2], seeded_noise(17, [0], SHAPE)[0])
    assert not torch.equal(drawn[0], drawn[1])


def test_noise_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    seeded_noise(0, range(3), SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_take_classes_in_turn() -> None:
    assert balanced_labels(range(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert balanced_labels([5], 3).dtype == torch.int64


def test_the_first_samples_are_in_the_shares_of_the_classes_however_many_they_are() -> None:
    assert labels_in_shares(7, [5, 5, 5]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    counts = np.array([500, *[20] * 9])
    labels = labels_in_shares(680, counts.tolist())
    assert labels.dtype == torch.int64 and np.bincount(labels).tolist() == counts.tolist()
    for first in (1, 2, 9, 100, 333):
        found = np.bincount(labels[:first], minlength=10)
        assert np.abs(found - first * counts / 680).max() < 1
    assert labels_in_shares(3, [1, 0, 2]).tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    "chunks",
    [
        [list(range(20))],
        [[i] for i in range(20)],
        [list(range(19, -1, -1))],
        [list(range(0, 20, 3)), list(range(1, 20, 3)), list(range(2, 20, 3))],
        [list(range(7)), list(range(7, 20))],
    ],
    ids=["at once", "one by one", "backwards", "strided", "uneven"],
)
def test_image_does_not_depend_on_the_other_samples(generator: nn.Module, vae: Any, chunks: list[list[int]]) -> None:
    whole = images_of(generator, vae, list(range(24)))
    latents = latents_of(generator, list(range(24)))
    for chunk in chunks:
        assert torch.equal(images_of(generator, vae, chunk), whole[chunk])
        assert torch.equal(latents_of(generator, chunk), latents[chunk])


def test_sample_is_always_in_the_same_slot_of_a_batch_of_one_size() -> None:
    class Placed(nn.Module):
        """Exaggerates rounding: its output depends on the slot in the batch and on the batch size."""

        def sample(self, x: Tensor, labels: Tensor, steps: int | None) -> Tensor:
            return x + torch.arange(len(x)).view(-1, 1, 1, 1) + 100 * len(x)

    whole = latents_of(Placed(), list(range(15)))
    for indices in ([14, 3, 4, 13, 0], [7], [5, 5, 11]):
        assert torch.equal(latents_of(Placed(), indices), whole[indices])


def test_an_index_can_be_drawn_in_several_classes(generator: nn.Module, vae: Any) -> None:
    sampler = sampler_of(generator, vae)
    both = sampler.latents([2, 2], torch.tensor([0, 1]), 0)
    for i in range(2):
        alone = sampler.latents([2], torch.tensor([i]), 0)
        assert torch.equal(both[i], alone[0])
    assert not torch.equal(both[0], both[1])


def test_a_latent_is_the_generator_of_noise_and_label(generator: nn.Module) -> None:
    indices = list(range(MICRO_BATCH))
    labels = balanced_labels(indices, CLASSES)
    with torch.no_grad():
        expected = generator(seeded_noise(5, indices, SHAPE), labels)
    assert torch.equal(latents_of(generator, indices, seed=5), expected)


def test_given_noises_are_used_in_turn(generator: nn.Module) -> None:
    noises, indices = seeded_noise(5, range(3), SHAPE), list(range(7))
    labels = balanced_labels(indices, CLASSES)
    with torch.no_grad():
        expected = torch.cat([generator(noises[[i % 3]], labels[[i]]) for i in indices])
    torch.testing.assert_close(sampler_of(generator).latents(indices, labels, noises), expected)


def test_seeds_and_indices_change_the_image(generator: nn.Module, vae: Any) -> None:
    first, second = images_of(generator, vae, [0, CLASSES])  # the same class
    assert not torch.equal(first, second)
    assert not torch.equal(images_of(generator, vae, [0], seed=4)[0], first)


def test_no_samples_are_no_images(generator: nn.Module) -> None:
    assert latents_of(generator, []).shape == (0, *SHAPE)


def test_non_finite_latents_are_refused_by_index(vae: Any) -> None:
    class Diverged(nn.Module):
        def sample(self, x: Tensor, labels: Tensor, steps: int | None) -> Tensor:
            return torch.where(labels.view(-1, 1, 1, 1) == 3, torch.nan, x)

    with pytest.raises(UserError, match="sample 8"):
        images_of(Diverged(), vae, [6, 7, 8, 9])
    assert len(images_of(Diverged(), vae, [5, 6, 7])) == 3
