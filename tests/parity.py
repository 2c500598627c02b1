"""Hold production's update to vectors of the released trainer.

    python -m tests.parity FOLDER

Every `step_*.npz` and `traj_*.npz` in the folder is checked: sizes are read from the tensors, the form and the number
of steps from the networks and times, the depth repeats from the name (`deep2`, `deep4`). It prints a line a file; the
exit code is 1 on a miss and 2 where there is no file. The updates are those of `AdversarialFlow.update`, stepped by the
trainer's own `Learner`, in float64.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afm_pipe.distributed.process_group import SINGLE_PROCESS
from afm_pipe.models import dit
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import ModelConfig
from afm_pipe.objectives.adversarial_flow.batches import Batch, DiscriminatorPart, Draw, GeneratorPart, PenaltyNoise
from afm_pipe.objectives.adversarial_flow.guidance import OneStepGuidance
from afm_pipe.objectives.adversarial_flow.losses import interpolate
from afm_pipe.objectives.adversarial_flow.objective import AdversarialFlow
from afm_pipe.objectives.base import Hyperparameters
from afm_pipe.objectives.schedules import cosine
from afm_pipe.params import Run
from afm_pipe.params.sizes import SIZES, ModelSize
from afm_pipe.training.learner import Learner
from afm_pipe.training.state import TrainingState

PROFILE = Path(__file__).parents[1] / "profiles" / "smoke.yaml"
HEAD_WIDTH = 8  # of the vectors' networks
PENALIZED = 2  # of the batch
STEP, TRAJECTORY, TRAJECTORY_WITH_TIMES = 1e-9, 1e-6, 5e-5
"""Tolerances: of a step's losses and gradients, relative; of the end of a trajectory, over the distance moved (more
where there are times: the released time code is float32, whose last bits differ between processors)."""

Vectors = Mapping[str, Tensor]


@dataclass
class Finding:
    """What was found of one file: the largest difference and where, against its tolerance."""

    name: str
    worst: float
    where: str
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "MISS "
        difference = f"largest difference {self.worst:.1e} (rule {self.tolerance:.0e})"
        return f"{verdict}  {self.name:<24} {difference} in {self.where}"


class Recorder(Learner):
    """The trainer's learner, which notes losses and gradients before each step."""

    def __init__(self, state: TrainingState, run: Run) -> None:
        super().__init__(state, run.ema, SINGLE_PROCESS)
        self.losses: list[float] = []
        self.gradients: dict[str, dict[str, Tensor]] = {}
        self.wanted = {"generator", "discriminator"}

    def step(self, name: str, loss: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        self.losses.append(loss.item())
        self.gradients[name] = {
            key: parameter.grad.clone()
            for key, parameter in self.networks[name].named_parameters()
            if parameter.grad is not None
        }
        return super().step(name, loss, hyperparameters)


class RolledAndErased:
    """The view of the augmented vectors: a roll along the last axis, then a mask."""

    def __init__(self, shift: int, keep: Tensor) -> None:
        self.shift, self.keep = shift, keep

    def __call__(self, x: Tensor) -> Tensor:
        return x.roll(self.shift, -1) * self.keep.to(x)


def base_run() -> Run:
    """Return the run whose settings the vectors do not decide."""
    from afm_pipe.params.file import load_params

    return load_params(PROFILE).runs["t4"]


class Released:
    """One file's networks and settings."""

    def __init__(self, name: str, vectors: Vectors, generator: str, discriminator: str) -> None:
        self.name, self.vectors = name, vectors
        self.weights = {
            "generator": under(vectors, generator),
            "discriminator": under(vectors, discriminator),
        }
        g, d = self.weights.values()
        width, channels, patch, _ = g["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in g if key.startswith("blocks."))
        self.channels, self.side = channels, patch * round(g["pos_embed"].shape[-2] ** 0.5)
        self.size = ModelSize(depth=depth, width=width, heads=width // HEAD_WIDTH, patch=patch)
        deep = re.search(r"deep(\d)", name)
        self.repeats = int(deep[1]) if deep else 1
        self.timed = any(key.startswith("t_embedder") for key in d)
        SIZES["released"] = self.size
        nfe: Any = 1
        if self.timed:
            nfe = "any" if any(key.startswith("t_tgt_embedder") for key in g) else self._steps()
        self.config = ModelConfig(
            size="released",
            channels=channels,
            latent_size=self.side,
            num_classes=len(g["y_embedder.embedding_table.weight"]),
            nfe=nfe,
            form="residual" if self.timed else "direct",
            repeats=self.repeats,
        )

    def _steps(self) -> int:
        prefix = "in/" if "in/timesteps_src" in self.vectors else "0/"
        gap = self.vectors[f"{prefix}timesteps_src"] - self.vectors[f"{prefix}timesteps_tgt"]
        return round(1 / float(gap.double().mean()))

    def run(self, **changes: Any) -> Run:
        """Return the settings of the vectors (shared by all of them) as a run's."""
        base = base_run()
        weights = {"weight": 0.25, "batch_fraction": 0.25, "epsilon": 0.01, "every": 1, "precision": "fp32"}
        penalty = base.penalty.model_copy(update=weights)
        ema = base.ema.model_copy(update={"decay": 0.99, "warmup": False})
        normalization = base.gradient_normalization.model_copy(update={"enabled": True, "decay": 0.9})
        settings = {
            "batch_size": 8,
            "lr": 1e-3,
            "betas": (0.0, 0.9),
            "eps": 1e-8,
            "weight_decay": 0.01,
            "penalty": penalty,
            "ema": ema,
            "gradient_normalization": normalization,
            "logit_centering": 0.01,
            "reuse_forward": False,
            "discriminator_updates": 1,
        }
        return base.model_copy(update=settings | changes)

    def learner(self, run: Run, classifier: nn.Module | None = None) -> tuple[AdversarialFlow, Recorder]:
        """Return production's objective and learner, at the initial weights."""
        objective = AdversarialFlow(run, self.config, classifier)
        state = TrainingState.fresh(objective, torch.device("cpu"))
        for name, network in state.networks.items():
            network.load_state_dict(self.weights[name])
        state.ema.load_state_dict(self.weights["generator"])
        return objective, Recorder(state, run)

    def batch(self, prefix: str) -> Batch:
        """Return the batch stored under a prefix, in float64."""
        latents, noise = (self.vectors[f"{prefix}{key}"].double() for key in ("latents", "noises_src"))
        labels = self.vectors[f"{prefix}labels"]
        if not self.timed:
            return Batch(latents, noise, labels)
        s, t = (self.vectors[f"{prefix}timesteps_{key}"].double() for key in ("src", "tgt"))
        target_noise = self.vectors[f"{prefix}noises_tgt"].double()
        return Batch(interpolate(latents, target_noise, t), interpolate(latents, noise, s), labels, s, t)

    def noise(self, prefix: str) -> PenaltyNoise:
        """Return the directions of the penalties stored under a prefix."""
        return PenaltyNoise(*(self.vectors[f"{prefix}noises_{key}"][:PENALIZED].double() for key in ("r1", "r2")))


def check_step(name: str, vectors: Vectors) -> Finding:
    """Compare one D step and one G step from the same weights: losses and every gradient."""
    released = Released(name, vectors, "weights_gen/", "weights_dis/")
    run = released.run(lr=0.0, weight_decay=0.0, batch_size=len(vectors["in/labels"]))
    objective, learner = released.learner(run)
    batch = released.batch("in/")
    draw = Draw([[DiscriminatorPart(batch, released.noise("in/"))]], [GeneratorPart(batch)])
    rates = {"generator": 0.0, "discriminator": 0.0}
    figures = objective.update(learner, draw, Hyperparameters(rates, {"transport": 0.2}))
    logged = dict(zip((term.name for term in objective.terms), figures, strict=True))
    found: dict[str, Tensor] = {
        "dis/loss/total": torch.tensor(learner.losses[0]),
        "dis/loss/dis": logged["d_adversarial"],
        "dis/loss/r1": 0.25 * logged["r1"],
        "dis/loss/r2": 0.25 * logged["r2"],
        "dis/loss/cp": 0.01 * logged["logit_centering"],
        "gen/loss/total": torch.tensor(learner.losses[1]),
        "gen/loss/gen": logged["g_adversarial"],
        "gen/loss/ot": 0.2 * logged["g_transport"],
        "gen/grad_norm_square_avg": learner.buffers["mean_square"],
    }
    for prefix, network in (("dis", "discriminator"), ("gen", "generator")):
        found |= {f"{prefix}/grad/{key}": value for key, value in learner.gradients[network].items()}
        stored = {key for key in vectors if key.startswith(f"{prefix}/grad/")}
        assert stored == {key for key in found if key.startswith(f"{prefix}/grad/")}, f"{name}: other gradients"
    differences = {key: relative(value, vectors[key].double(), vectors[key].double()) for key, value in found.items()}
    return finding(name, differences, STEP)


def check_trajectory(name: str, vectors: Vectors) -> Finding:
    """Compare a whole training: the final G, D and moving average, the normalizer's state, and every loss."""
    released = Released(name, vectors, "init_gen/", "init_dis/")
    run = released.run(batch_size=len(vectors["0/labels"]))
    classifier = _classifier(released)
    objective, learner = released.learner(run, classifier)
    state, steps = learner.state, len(vectors["losses"])
    for update in range(steps // 2):
        d, g = f"{2 * update}/", f"{2 * update + 1}/"
        of_d = DiscriminatorPart(released.batch(d), released.noise(d), _view(vectors, d))
        of_g = GeneratorPart(released.batch(g), _view(vectors, g), _guide(vectors, g, classifier))
        weight = cosine(0.2, 0.01, 2 * update + 1, 20)
        rates = {"generator": run.lr, "discriminator": run.lr}
        objective.update(learner, Draw([[of_d]], [of_g]), Hyperparameters(rates, {"transport": weight}))
        learner.update_ema()
        state.update += 1
    differences = {}
    for prefix, initial, network in (
        ("final_gen/", "generator", state.networks["generator"]),
        ("final_dis/", "discriminator", state.networks["discriminator"]),
        ("final_ema/", "generator", state.ema),
    ):
        expected = under(vectors, prefix)
        start = released.weights[initial]
        moved = norm({key: value.double() - start[key].double() for key, value in expected.items()})
        away = norm({key: value - expected[key].double() for key, value in network.state_dict().items()})
        differences[prefix] = away / moved
    square = vectors["square_avg"].double()
    differences["square_avg"] = relative(state.buffers["mean_square"], square, square)
    losses = torch.tensor(learner.losses, dtype=torch.float64)
    differences["losses"] = relative(losses, vectors["losses"].double(), vectors["losses"].double())
    return finding(name, differences, TRAJECTORY_WITH_TIMES if released.timed else TRAJECTORY)


def _classifier(released: Released) -> nn.Module | None:
    weights = under(released.vectors, "cls/")
    if not weights:
        return None
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    size = ModelSize(depth=depth, width=width, heads=width // HEAD_WIDTH, patch=patch)
    classifier = LatentClassifier(size, channels, released.side, len(weights["final_layer.1.weight"]))
    classifier.load_state_dict(weights)
    return classifier.requires_grad_(False)


def _view(vectors: Vectors, prefix: str) -> Any:
    if f"{prefix}keep" not in vectors:
        return None
    return RolledAndErased(int(vectors[f"{prefix}shift"]), vectors[f"{prefix}keep"])


def _guide(vectors: Vectors, prefix: str, classifier: nn.Module | None) -> Any:
    if classifier is None:
        return None
    noise, times = (vectors[f"{prefix}{key}_cg"].double() for key in ("noises", "timesteps"))
    return OneStepGuidance(classifier, 0.02, vectors[f"{prefix}labels"], noise, times)


def under(vectors: Vectors, prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it, in float64."""
    return {
        key.removeprefix(prefix): value.double() if value.is_floating_point() else value
        for key, value in vectors.items()
        if key.startswith(prefix)
    }


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the norm over all tensors."""
    return float(torch.stack([value.double().square().sum() for value in tensors.values()]).sum().sqrt())


def relative(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """Return the norm of a difference over that of `scale`."""
    return float((found.double() - expected).norm() / scale.norm().clamp(min=1e-300))


def finding(name: str, differences: Mapping[str, float], tolerance: float) -> Finding:
    """Return the largest of some differences; one that is not a number is the largest."""
    worst = max(differences, key=lambda key: (differences[key] != differences[key], differences[key]))
    value = differences[worst]
    return Finding(name, value if value == value else float("inf"), worst, tolerance)


@contextmanager
def released_arithmetic() -> Iterator[None]:
    """Compute in float64, with the rates of the time code of the processor that the vectors come from.

    Its float32 exponential is one unit in the last place above the correctly rounded one at two of 128 rates, found by
    solving for them; without these, times of 1000 turn that into differences of 1e-6 in the outputs.
    """
    rates = dit.time_rates(torch.device("cpu")).clone()
    rates[[12, 106]] = torch.nextafter(rates[[12, 106]], torch.tensor(2.0))
    before, dtype = dit.time_rates, torch.get_default_dtype()
    dit.time_rates = lambda device: rates  # type: ignore[assignment]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        dit.time_rates = before
        torch.set_default_dtype(dtype)


def read(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a file."""
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in file.items()}


def check(path: Path) -> Finding:
    """Check one file."""
    with released_arithmetic():
        checked = check_step if path.stem.startswith("step_") else check_trajectory
        return checked(path.stem, read(path))


def main(arguments: list[str]) -> int:
    """Check every file of a folder; return the exit code."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    paths = sorted(path for kind in ("step_*", "traj_*") for path in Path(arguments[0]).glob(f"{kind}.npz"))
    findings = []
    for path in paths:
        findings.append(check(path))
        print(findings[-1], flush=True)
    if not findings:
        print(f"Found no step_*.npz or traj_*.npz in {arguments[0]}.", file=sys.stderr)
        return 2
    return 0 if all(each.passed for each in findings) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
