"""Parts of the tests of encoding: a small autoencoder, changed params, child processes."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.params import Params

SHA256 = "a" * 64


def changed(params: Params, section: str, **fields: object) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=fields)})


def tiny_vae(seed: int = 0, channels: int = 1) -> KLAutoencoder:
    """Return an untrained autoencoder of images of 32 x 32 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            mid_block_add_attention=False,
            scaling_factor=0.7,
        )
    return KLAutoencoder(model, 32)


def unfinished(work_dir: Path) -> list[Path]:
    return [path for path in work_dir.iterdir() if path.name != "lock"]


def in_child(work: Callable[[], None]) -> int | None:
    """Run `work` in a forked process; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode
