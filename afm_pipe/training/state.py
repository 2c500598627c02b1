"""Everything stateful of a run, and its checkpoints: saved whole or not at all, checked before use.

A checkpoint is a folder update-NNNNNNNNN with one safetensors file per part and a manifest.json that lists their
sizes and hashes. The latest is the highest whose files are what its manifest says.
"""

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from afm_pipe.errors import UserError
from afm_pipe.files import atomic_path, read_json, sha256_file, write_json
from afm_pipe.models.checkpoint_format import (
    ModelConfig,
    build_discriminator,
    build_generator,
    load_exactly,
    load_tensors,
    save_tensors,
)
from afm_pipe.models.discriminator import Discriminator
from afm_pipe.models.generator import Generator
from afm_pipe.params import Run
from afm_pipe.training.curves import Row, read_curves, write_curves
from afm_pipe.training.gradient_norm import GradientNormalizer

KEPT = 2  # checkpoints: the latest, and one in case the latest is damaged
CLOCKS = ("training", "data_wait", "saving")  # the latter two are parts of the first


class Start(NamedTuple):
    """What a guided run begins from: its base's moving average, its last D, and its number of updates."""

    generator: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    update: int


@dataclass
class TrainingState:
    """Networks, optimizers, moving averages and the clock (in updates) of a run."""

    generator: Generator
    discriminator: Discriminator
    ema: Generator
    optimizer_generator: torch.optim.AdamW
    optimizer_discriminator: torch.optim.AdamW
    normalizer: GradientNormalizer
    update: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLOCKS, 0.0))  # over all sittings
    rows: list[Row] = field(default_factory=list)  # of the training curves so far

    @classmethod
    def fresh(cls, config: ModelConfig, run: Run, device: torch.device) -> "TrainingState":
        """Return the state before the first update; initial weights depend on run.seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            generator, discriminator = build_generator(config), build_discriminator(config)
        generator, discriminator = generator.to(device), discriminator.to(device)
        return cls(
            generator,
            discriminator,
            copy.deepcopy(generator).requires_grad_(False),
            _adamw(generator, run),
            _adamw(discriminator, run),
            GradientNormalizer(run.gradient_normalization.decay, device),
        )

    def begin_from(self, start: Start) -> None:
        """Take over a trained run's weights and clock; the optimizers begin anew (their memory is ten updates long)."""
        for module in (self.generator, self.ema):
            module.load_state_dict(start.generator)
        self.discriminator.load_state_dict(start.discriminator)
        self.update = start.update

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors of the state by part and name."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer_generator": optimizer_tensors(self.optimizer_generator),
            "optimizer_discriminator": optimizer_tensors(self.optimizer_discriminator),
            "normalizer": {"mean_square": self.normalizer.mean_square},
        }

    def load_tensors(self, tensors: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """Take over tensors as `tensors` returns them. Raises UserError when they are of another model."""
        for part in ("generator", "discriminator", "ema"):
            load_exactly(getattr(self, part), tensors[part], folder / f"{part}.safetensors")
        load_optimizer(self.optimizer_generator, tensors["optimizer_generator"])
        load_optimizer(self.optimizer_discriminator, tensors["optimizer_discriminator"])
        self.normalizer.mean_square.copy_(tensors["normalizer"]["mean_square"])


class Resumable(Protocol):
    """What a checkpoint holds: tensors by part and name, rows of curves, a clock."""

    update: int
    seconds: dict[str, float]
    rows: list[Row]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors of the state by part and name."""

    def load_tensors(self, tensors: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """Take over tensors as `tensors` returns them. Raises UserError when they are of another model."""


def save_checkpoint(folder: Path, state: Resumable, fingerprint: str) -> None:
    """Write a checkpoint of `state` under `folder` and drop all but the newest `KEPT`."""
    with atomic_path(folder / f"update-{state.update:09d}") as aside:
        aside.mkdir()
        for part, tensors in state.tensors().items():
            save_tensors(aside / f"{part}.safetensors", tensors)
        write_curves(aside / "curves.csv", state.rows, tuple(state.rows[0]) if state.rows else ())
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(aside.iterdir())
        }
        manifest = {"fingerprint": fingerprint, "update": state.update, "seconds": state.seconds, "files": files}
        write_json(aside / "manifest.json", manifest)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_latest(folder: Path, state: Resumable, fingerprint: str) -> list[str]:
    """Bring `state` to the newest checkpoint under `folder` that is whole; leave it as it is when there is none.

    Returns a line for each damaged checkpoint passed over. Raises UserError for a checkpoint of other params.
    """
    passed_over, parts = [], list(state.tensors())
    for checkpoint in reversed(checkpoints(folder)):
        damage = _damage(checkpoint, parts)
        if damage:
            passed_over.append(f"Found {checkpoint} damaged ({damage}): went on from an earlier one.")
            continue
        manifest = read_json(checkpoint / "manifest.json")
        if manifest["fingerprint"] != fingerprint:
            raise UserError(
                f"Found {checkpoint} made with other params, data or code (fingerprint {manifest['fingerprint']}), "
                f"expected {fingerprint}: delete the folder, or restore the params."
            )
        state.load_tensors({part: load_tensors(checkpoint / f"{part}.safetensors") for part in parts}, checkpoint)
        state.rows = read_curves(checkpoint / "curves.csv")
        state.update, state.seconds = manifest["update"], manifest["seconds"]
        break
    return passed_over


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under `folder`, oldest first."""
    return sorted(folder.glob("update-*"))


def _damage(checkpoint: Path, parts: list[str]) -> str | None:
    try:
        files = read_json(checkpoint / "manifest.json")["files"]
        for name in ("curves.csv", *(f"{part}.safetensors" for part in parts)):
            path = checkpoint / name
            if path.stat().st_size != files[name]["bytes"] or sha256_file(path) != files[name]["sha256"]:
                return f"{name} is not what the manifest says"
    except (UserError, OSError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _adamw(module: nn.Module, run: Run) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(), lr=run.lr, betas=run.betas, eps=run.eps, weight_decay=run.weight_decay, fused=True
    )


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return an optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Take over an optimizer's state as `optimizer_tensors` returns it."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
