"""Normalization of latents, and pixels to uint8 and back."""

import pytest
import torch

from afm_pipe.params import LatentSpec

LATENT = (4, 2, 2)


@pytest.mark.parametrize("image_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_quantization_rounds_clamps_and_undoes_pixels(image_range: tuple[float, float]) -> None:
    spec, images = LatentSpec(LATENT, True, image_range=image_range), torch.arange(256).byte()
    pixels = spec.to_pixels(images)
    low, high = image_range
    assert (pixels[0], pixels[255]) == (low, high)
    assert torch.equal(spec.to_uint8(pixels), images)
    assert torch.equal(spec.to_uint8(pixels + 0.4 * (high - low) / 255), images)
    assert spec.to_uint8(torch.tensor([low - 9, high + 9])).tolist() == [0, 255]


def test_denormalization_undoes_normalization() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, mean = torch.randn(3, *LATENT, generator=generator), torch.randn(LATENT, generator=generator)
    std = torch.rand(LATENT, generator=generator) + 0.5
    scalar = LatentSpec(LATENT, True, scaling_factor=0.18215)
    torch.testing.assert_close(scalar.normalize(latents), latents * 0.18215)
    elementwise = LatentSpec(LATENT, False, mean=mean, std=std)
    torch.testing.assert_close(elementwise.normalize(latents), (latents - mean) / std)
    for spec in (scalar, elementwise):
        torch.testing.assert_close(spec.denormalize(spec.normalize(latents)), latents)


def test_stochastic_latents_are_stored_as_mean_and_deviation() -> None:
    assert LatentSpec(LATENT, stochastic=True).encoded_shape == (8, 2, 2)
    assert LatentSpec(LATENT, stochastic=False).encoded_shape == LATENT
