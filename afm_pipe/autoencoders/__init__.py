"""Autoencoders. Each kind is a module of this package, with its params in `params/autoencoders.py`."""

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
    """Load the autoencoder in a folder: fp32, no gradients. Raises UserError if it is not of the kind in params."""
    return autoencoder_kind(params).load(params, folder).to(device or "cpu")
