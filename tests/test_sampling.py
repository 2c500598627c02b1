"""Samples by index: the same whatever is generated beside them."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.models.flow import Flow
from afm_pipe.models.generator import Generator
from afm_pipe.params import LatentSpec
from afm_pipe.params.sizes import ModelSize
from afm_pipe.runtime.errors import UserError
from afm_pipe.sampling.generate import generate_images, generate_latents, grid, labels_for, noise

SHAPE = (4, 8, 8)
MICRO_BATCH = 6
CLASSES = 5


@pytest.fixture(scope="module")
def generator() -> nn.Module:
    torch.manual_seed(0)
    model = Generator(ModelSize(depth=2, width=64, heads=4, patch=4), 4, 8, CLASSES)
    with torch.no_grad():  # it starts as zero: give every weight something to say
        for weight in model.parameters():
            weight.normal_(std=0.1)
    return Flow(model.eval(), "direct", nfe=1)


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 16, 32), norm_num_groups=8, **blocks)
    return KLAutoencoder(model, SHAPE[1] * 4)


def images_of(generator: nn.Module, vae: Any, indices: list[int], seed: int = 3) -> Tensor:
    return generate_images(generator, vae, seed, indices, labels_for(indices, CLASSES), SHAPE, MICRO_BATCH)


def test_noise_of_an_index_depends_on_seed_plus_index_alone() -> None:
    drawn = noise(10, [4, 0, 7], SHAPE)
    assert drawn.shape == (3, *SHAPE) and drawn.dtype == torch.float32
    assert torch.equal(drawn[1], torch.randn(SHAPE, generator=torch.Generator().manual_seed(10)))
    assert torch.equal(drawn[2], noise(17, [0], SHAPE)[0])
    assert not torch.equal(drawn[0], drawn[1])


def test_noise_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    noise(0, range(3), SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_take_classes_in_turn() -> None:
    assert labels_for(range(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert labels_for([5], 3).dtype == torch.int64


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
def test_an_image_does_not_depend_on_what_is_generated_beside_it(
    generator: nn.Module, vae: Any, chunks: list[list[int]]
) -> None:
    whole = images_of(generator, vae, list(range(24)))
    latents = generate_latents(generator, 3, range(24), labels_for(range(24), CLASSES), SHAPE, MICRO_BATCH)
    for chunk in chunks:
        labels = labels_for(chunk, CLASSES)
        assert torch.equal(images_of(generator, vae, chunk), whole[chunk])
        assert torch.equal(generate_latents(generator, 3, chunk, labels, SHAPE, MICRO_BATCH), latents[chunk])


def test_a_sample_always_sits_in_the_same_place_of_a_batch_of_the_same_size() -> None:
    class Placed(nn.Module):
        """Exaggerates what rounding may do: its output depends on the place in the batch and the batch's size."""

        def sample(self, x: Tensor, labels: Tensor) -> Tensor:
            return x + torch.arange(len(x)).view(-1, 1, 1, 1) + 100 * len(x)

    def latents(indices: list[int]) -> Tensor:
        return generate_latents(Placed(), 0, indices, labels_for(indices, CLASSES), SHAPE, MICRO_BATCH)

    whole = latents(list(range(15)))
    for indices in ([14, 3, 4, 13, 0], [7], [5, 5, 11]):
        assert torch.equal(latents(indices), whole[indices])


def test_one_index_may_be_asked_for_in_several_classes(generator: nn.Module, vae: Any) -> None:
    both = generate_latents(generator, 0, [2, 2], torch.tensor([0, 1]), SHAPE, MICRO_BATCH)
    for i in range(2):
        alone = generate_latents(generator, 0, [2], torch.tensor([i]), SHAPE, MICRO_BATCH)
        assert torch.equal(both[i], alone[0])
    assert not torch.equal(both[0], both[1])


def test_a_latent_is_the_generator_of_noise_and_label(generator: nn.Module) -> None:
    indices = list(range(MICRO_BATCH))
    labels = labels_for(indices, CLASSES)
    with torch.no_grad():
        expected = generator(noise(5, indices, SHAPE), labels)
    assert torch.equal(generate_latents(generator, 5, indices, labels, SHAPE, MICRO_BATCH), expected)


def test_seeds_and_indices_change_the_image(generator: nn.Module, vae: Any) -> None:
    first, second = images_of(generator, vae, [0, CLASSES])  # the same class
    assert not torch.equal(first, second)
    assert not torch.equal(images_of(generator, vae, [0], seed=4)[0], first)


def test_no_samples_are_no_images(generator: nn.Module) -> None:
    assert generate_latents(generator, 0, [], torch.empty(0, dtype=torch.int64), SHAPE, MICRO_BATCH).shape == (
        0,
        *SHAPE,
    )


def test_latents_that_are_not_finite_are_refused_by_index(vae: Any) -> None:
    class Diverged(nn.Module):
        def sample(self, x: Tensor, labels: Tensor) -> Tensor:
            return torch.where(labels.view(-1, 1, 1, 1) == 3, torch.nan, x)

    with pytest.raises(UserError, match="sample 8, seed 3"):
        images_of(Diverged(), vae, [6, 7, 8, 9])
    assert len(images_of(Diverged(), vae, [5, 6, 7])) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_quantised_images_equal_a_png_round_trip(channels: int) -> None:
    image = LatentSpec((4, 2, 2), True).to_uint8(
        torch.rand(1, channels, 9, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    file = io.BytesIO()
    grid(image, columns=1, gap=0).save(file, "PNG")
    back = np.asarray(Image.open(file)).reshape(9, 7, channels).transpose(2, 0, 1)
    assert (back == image[0].numpy()).all()


def test_grid_lays_out_row_by_row_on_white() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 3)
    sheet = np.asarray(grid(images, columns=2, gap=1))
    assert sheet.shape == (3 * 5 + 1, 2 * 4 + 1)
    assert sheet[1, 1] == 0 and sheet[1, 5] == 1 and sheet[6, 1] == 2 and sheet[11, 1] == 4
    assert (sheet[11:, 5:] == 255).all() and (sheet[0] == 255).all()
