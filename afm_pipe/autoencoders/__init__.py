"""Autoencoders: the seam to any latent space. A kind is a module here, with its params in `params/autoencoders.py`."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from afm_pipe.params import Params

if TYPE_CHECKING:
    import torch

    from afm_pipe.autoencoders.base import Autoencoder


def autoencoder_kind(params: Params) -> "type[Autoencoder]":
    """Return the class of the autoencoder's kind."""
    from afm_pipe.autoencoders.base import Autoencoder

    kind = params.autoencoder.kind
    if kind not in Autoencoder.kinds:
        import_module(f"{__name__}.{kind}")
    return Autoencoder.kinds[kind]


def load_autoencoder(params: Params, folder: Path, device: "torch.device | None" = None) -> "Autoencoder":
    """Load the autoencoder of a folder: fp32, no gradients. Raises UserError when the folder is not of params' kind."""
    return autoencoder_kind(params).load(params, folder).to(device or "cpu")
