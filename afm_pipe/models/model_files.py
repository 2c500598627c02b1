"""A trained model on disk: models/RUN/ with generator.safetensors, discriminator.safetensors and config.json.

Sampling needs this folder only. Weights have the released key names.
"""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.flow import Flow
from afm_pipe.models.generator import Generator, Times
from afm_pipe.models.path_discriminator import PathDiscriminator
from afm_pipe.models.tensor_files import check_safetensors
from afm_pipe.models.velocity import VelocityFlow, VelocityNetwork
from afm_pipe.params import Run
from afm_pipe.params.flow import OdeSampling
from afm_pipe.params.sizes import SIZES, ModelSize
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json

M = TypeVar("M", bound=nn.Module)


class VelocityConfig(OdeSampling):
    """The "velocity" entry of a model: how its ODE is solved, and whether it has a label of no class."""

    unconditional: bool


class ModelConfig(BaseModel):
    """The "model" entry of config.json: size, shapes, form, and number of steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str
    channels: Annotated[int, Field(ge=1, le=4096)]
    latent_size: Annotated[int, Field(ge=1, le=4096)]
    num_classes: Annotated[int, Field(ge=1, le=10**7)]
    nfe: Annotated[int, Field(ge=1, le=1024)] | Literal["any"] = 1
    form: Literal["direct", "residual"] = "direct"
    repeats: Literal[1, 2, 4] = 1
    qk_norm: bool = False
    condition_on_source: bool = False
    velocity: VelocityConfig | None = Field(None, exclude_if=lambda value: value is None)
    """Of a network that is the velocity of an ODE; `nfe` is then that of the default sampling."""

    @property
    def times(self) -> Times:
        """The times on which the generator is conditioned."""
        if self.velocity is not None:
            return "source"
        return "none" if self.nfe == 1 else "both" if self.nfe == "any" else "source"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        return self.channels, self.latent_size, self.latent_size


def build_generator(config: ModelConfig) -> Generator:
    """Build the generator of a config, freshly initialized on the default device."""
    if config.velocity is not None:
        return VelocityNetwork(*_velocity_shape(config), qk_norm=config.qk_norm)
    shape = SIZES[config.size], config.channels, config.latent_size, config.num_classes
    return Generator(*shape, times=config.times, repeats=config.repeats, qk_norm=config.qk_norm)


def build_discriminator(config: ModelConfig) -> Discriminator | PathDiscriminator:
    """Build the discriminator of a config, freshly initialized on the default device."""
    if config.velocity is not None:
        return PathDiscriminator(*_velocity_shape(config), qk_norm=config.qk_norm)
    shape = SIZES[config.size], config.channels, config.latent_size, config.num_classes
    return Discriminator(
        *shape,
        time_conditioned=config.nfe != 1,
        qk_norm=config.qk_norm,
        source_conditioned=config.condition_on_source,
    )


def _velocity_shape(config: ModelConfig) -> tuple[ModelSize, int, int, int]:
    assert config.velocity is not None
    return SIZES[config.size], config.channels, config.latent_size, config.num_classes + config.velocity.unconditional


def build_sampler(network: nn.Module, config: ModelConfig) -> Flow | VelocityFlow:
    """Return what draws samples with the generator of a config."""
    if config.velocity is not None:
        return VelocityFlow(cast(VelocityNetwork, network), config.velocity)
    return Flow(cast(Generator, network), config.form, config.nfe)


def run_config(run: Run, latent_shape: tuple[int, int, int], num_classes: int) -> ModelConfig:
    """Return the config of the model that a run trains on latents of `latent_shape`."""
    channels, latent_size, _ = latent_shape
    names = ("size", "nfe", "form", "repeats", "qk_norm", "condition_on_source")
    fields = {name: getattr(run, name) for name in names}
    if run.velocity is not None:
        sampling = run.velocity.sampling.model_dump()
        velocity = VelocityConfig(**sampling, unconditional=run.velocity.label_dropout > 0)
        fields |= {"velocity": velocity, "nfe": run.passes, "form": "direct"}
    return ModelConfig(channels=channels, latent_size=latent_size, num_classes=num_classes, **fields)


def save_model(folder: Path, networks: Mapping[str, nn.Module], config: dict[str, Any]) -> None:
    """Write a model folder with networks by name; `config` holds a ModelConfig under "model", and the provenance."""
    folder.mkdir(parents=True)
    for name, network in networks.items():
        save_tensors(folder / f"{name}.safetensors", network.state_dict())
    counts = {f"{name}_parameters": count_parameters(network) for name, network in networks.items()}
    write_json(folder / "config.json", config | counts)


def load_generator(folder: Path, device: torch.device) -> Flow | VelocityFlow:
    """Load the generator of a model folder, in eval mode. Raises UserError if the weights do not match the config."""
    config = load_config(folder)
    network = load_network(lambda: build_generator(config), folder / "generator.safetensors", device)
    return build_sampler(network, config)


def load_network(build: Callable[[], M], path: Path, device: torch.device) -> M:
    """Build a network and load its weights, in eval mode. Raises UserError if the weights do not match."""
    tensors = load_tensors(path)
    with torch.device("meta"):  # check before allocating memory
        require_match(build(), tensors, path)
    network = build()
    network.load_state_dict(tensors)
    return network.to(device).eval().requires_grad_(False)


def load_config(folder: Path) -> ModelConfig:
    """Read the config of a model folder. Raises UserError if it does not describe a model."""
    config = read_json(folder / "config.json")
    try:
        model = ModelConfig.model_validate(config["model"])
        if model.size not in SIZES:
            raise ValueError(f"unknown size {model.size}")
        if model.latent_size % SIZES[model.size].patch:
            raise ValueError(f"latent_size {model.latent_size} is not a multiple of patch {SIZES[model.size].patch}")
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{error}"[:300]
        path = folder / "config.json"
        raise UserError(f"Found {path} that does not describe a model ({reason}): train it again.") from None
    return model


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors, on any device, as safetensors. Raises OSError if the disk is full."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # which hides the errno
        raise OSError(errno.ENOSPC, str(error)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU. Raises UserError if it is missing or damaged."""
    try:
        check_safetensors(path)
        return load_file(path)
    except Exception as error:  # an unknown dtype is a KeyError
        raise UserError(f"Found {path} missing or damaged ({error}): run the stage that writes it again.") from None


def load_exactly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors into a module. Raises UserError naming the first mismatches of names and shapes."""
    require_match(module, tensors, path)
    module.load_state_dict(tensors)


def require_match(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError naming the first tensors that do not match the module's names and shapes."""
    problems = mismatches(module, tensors)
    if problems:
        raise UserError(
            f"Found weights in {path} that do not match the model in config.json: {'; '.join(problems[:5])}"
            f"{' and more' if len(problems) > 5 else ''}. Use the config.json that belongs to them, or train again."
        )


def mismatches(module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Return a sorted list of missing and unexpected tensors, and of tensors of wrong shape or kind of dtype."""
    expected = module.state_dict()
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} of shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems += [
        f"{name} of {str(tensors[name].dtype).removeprefix('torch.')}, expected floating point"
        for name, value in expected.items()
        if name in tensors and value.is_floating_point() and not tensors[name].is_floating_point()
    ]
    return sorted(problems)


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, including the fixed position embedding, as the paper counts them."""
    return sum(tensor.numel() for tensor in module.state_dict().values())
