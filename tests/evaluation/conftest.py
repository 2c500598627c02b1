"""Real images painted by a known generator, their reference, and the autoencoder that decoded them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.evaluation.reference import build_reference
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.sampler import balanced_labels
from tests.evaluation.painter import REAL_SEED, SHAPE, Painter, manifest_of, params_with, sampler_of


@pytest.fixture(scope="session")
def vae() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(
            in_channels=1, out_channels=1, block_out_channels=(8, 16, 32), norm_num_groups=8, **blocks
        )
    model.decoder.conv_out.weight.data *= 4  # untrained, it paints in faint grays
    return KLAutoencoder(model, SHAPE[1] * 4)


@pytest.fixture(scope="session")
def real(vae: Any) -> tuple[np.ndarray, np.ndarray]:
    """Real images (300, 1, 16, 16), sorted by class as a data set is, and their labels."""
    indices = sorted(range(300), key=lambda i: i % 3)
    labels = balanced_labels(indices, 3)
    images = sampler_of(Painter(), vae).images(indices, labels, REAL_SEED)
    return images.numpy(), labels.numpy()


@pytest.fixture(scope="session")
def reference(real: tuple[np.ndarray, np.ndarray], vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    track("reference", build_reference(params_with(), manifest_of(real[1]), real[0], vae, folder))
    return folder
