"""A trained model on disk: models/RUN/ with generator.safetensors, discriminator.safetensors and config.json.

The folder is all that anything that samples needs. Weights carry the released key names.
"""

import errno
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afm_pipe.errors import UserError
from afm_pipe.files import read_json, write_json
from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.generator import Generator
from afm_pipe.models.sizes import SIZES


def build_generator(config: dict[str, Any]) -> Generator:
    """Build the generator a config describes, with fresh weights on the current default device."""
    return Generator(SIZES[config["size"]], config["channels"], config["latent_size"], config["num_classes"])


def build_discriminator(config: dict[str, Any]) -> Discriminator:
    """Build the discriminator a config describes, with fresh weights on the current default device."""
    return Discriminator(SIZES[config["size"]], config["channels"], config["latent_size"], config["num_classes"])


def save_model(folder: Path, generator: nn.Module, discriminator: nn.Module, config: dict[str, Any]) -> None:
    """Write a model folder: `config` holds the model's shape under "model" and where it comes from beside it."""
    folder.mkdir(parents=True)
    save_tensors(folder / "generator.safetensors", generator.state_dict())
    save_tensors(folder / "discriminator.safetensors", discriminator.state_dict())
    counts = {
        "generator_parameters": count_parameters(generator),
        "discriminator_parameters": count_parameters(discriminator),
    }
    write_json(folder / "config.json", config | counts)


def load_generator(folder: Path, device: torch.device) -> Generator:
    """Load the generator of a model folder, in evaluation mode. Raises UserError naming what does not fit."""
    config = read_json(folder / "config.json")
    generator = build_generator(config["model"])
    load_exactly(generator, load_tensors(folder / "generator.safetensors"), folder / "generator.safetensors")
    return generator.to(device).eval().requires_grad_(False)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors, from whatever device they are on. Raises OSError when there is no room."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # which hides the number of the system's error
        raise OSError(errno.ENOSPC, str(error)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError when it is absent or damaged."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"Found {path} missing or damaged ({error}): run the stage that writes it again.") from None


def load_exactly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors whose names and shapes are exactly the module's. Raises UserError naming the first that are not."""
    expected = module.state_dict()
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} of shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        raise UserError(
            f"Found weights in {path} that do not fit the model its config names: {'; '.join(sorted(problems)[:5])}"
            f"{' and more' if len(problems) > 5 else ''}. Take the folder's own config.json, or train again."
        )
    module.load_state_dict(tensors)


def count_parameters(module: nn.Module) -> int:
    """Return the number of learned parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
