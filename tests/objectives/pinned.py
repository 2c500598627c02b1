"""Short runs of every form in float64, whose numbers are pinned in tests/golden/pins.json.

python -m tests.objectives.pinned      rewrites the pins; raise the version in afm_pipe/params/versions.yaml first
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from afm_pipe.data.latents import Latents
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.objectives.base import Objective
from afm_pipe.objectives.latent_classifier import ClassifierTraining
from afm_pipe.params import Classifier, Run, deep_merge
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES
from afm_pipe.params.versions import versions
from afm_pipe.training.state import Start, TrainingState
from afm_pipe.training.trainer import Runtime, Task, Trainer
from tests.conftest import ROOT, SMOKE

FILE = ROOT / "tests" / "golden" / "pins.json"
TOLERANCE = 1e-9  # relative; processors differ in the last bits
IMAGES, BATCH, UPDATES = 64, 8, 4
END = UPDATES * BATCH / IMAGES  # in epochs
Pins = dict[str, dict[str, Any]]

# Every field that shapes numbers, so that the pins do not depend on a profile.
RUN = {
    "seed": 3,
    "objective": "adversarial_flow",
    "size": "s4",
    "nfe": 1,
    "form": "direct",
    "repeats": 1,
    "qk_norm": False,
    "precision": "fp32",  # runs all in the default dtype, here float64
    "condition_on_source": False,
    "reuse_forward": False,
    "label_noise": 0.0,
    "batch_size": BATCH,
    "lr": 1e-3,
    "betas": [0.0, 0.9],
    "eps": 1e-8,
    "weight_decay": 0.01,
    "ema": {"decay": 0.9, "warmup": True},
    "penalty": {"weight": 0.25, "batch_fraction": 0.5, "epsilon": 0.01, "every": 1, "precision": "fp32"},
    "logit_centering": 0.01,
    "transport": {"start": 0.2, "end": 0.05, "decay_epochs": END},
    "gradient_normalization": {"enabled": True, "decay": 0.9},
    "schedule": "fixed",
    "monitor": {"policy": "off"},
    "phases": [{"until_epoch": END}],
}
SAMPLING = {"solver": "heun", "steps": 2, "guidance_scale": 1.5, "guidance_interval": [0.0, 0.7]}
FLOW = {"times": "uniform", "label_dropout": 0.25, "warmup": 1, "sampling": SAMPLING}
ADVERSARIAL = {"objective": "continuous_adversarial_flow", "discriminator_updates": 1}
AUGMENT = {"probability": 0.7, "translate": 0.3, "erasings": 1, "area": [0.1, 0.5]}
CASES: dict[str, dict[str, Any]] = {
    "one_step": {},
    "one_step_t4": {"size": "t4"},
    "two_steps": {"nfe": 2},
    "any_step": {"nfe": "any"},
    "deep": {"repeats": 2, "qk_norm": True},
    "residual": {"form": "residual", "nfe": 2},
    "guided": {"phases": [{"until_epoch": END, "guidance": {"scale": 0.5, "t": [0.0, 0.5]}}]},
    "guided_steps": {"nfe": 2, "phases": [{"until_epoch": END, "guidance": {"scale": 0.5, "at": [0.0]}}]},
    "augmented": {"phases": [{"until_epoch": END, "augment": AUGMENT}]},
    "lazy_penalty_reused_forward": {"penalty": {"every": 2}, "reuse_forward": True},
    "no_gradient_normalization": {"gradient_normalization": {"enabled": False}},
    "noisy_labels_seen_source": {"label_noise": 0.5, "condition_on_source": True},
    "flow_matching": {"objective": "flow_matching", "flow": FLOW},
    "continuous_adversarial_flow": ADVERSARIAL | {"flow": FLOW | {"times": "logit_normal"}},
    "phases": {
        "phases": [
            {"until_epoch": END / 2},
            {
                "until_epoch": END,
                "lr": 5e-4,
                "lr_discriminator": 2e-3,
                "transport": {"start": 0.1, "end": 0.1, "decay_epochs": 1.0},
                "gradient_clip": 0.5,
                "reload_ema": "epoch",
            },
        ]
    },
}
CONTINUED = {"phases": [{"until_epoch": END}, {"until_epoch": 2 * END, "guidance": {"scale": 0.5, "t": [0.0, 0.5]}}]}
CLASSIFIER = {
    "size": "s4",
    "batch_size": BATCH,
    "lr": 1e-3,
    "betas": [0.9, 0.95],
    "weight_decay": 0.01,
    "ema": {"decay": 0.9, "warmup": True},
    "epochs": END,
    "affine": {"probability": 0.8, "degrees": 10.0, "translate": 0.1, "scale": [1.0, 1.1]},
}


class MemoryLatents:
    """Latents of five classes in memory, in place of a latents file."""

    num_images, num_mirrors, num_classes, latent_shape = IMAGES, 1, 5, (4, 8, 8)
    classes = ("a", "b", "c", "d", "e")
    labels = np.arange(IMAGES) % 5

    def __init__(self) -> None:
        self.x = torch.randn(IMAGES, *self.latent_shape, generator=torch.Generator().manual_seed(1))

    def draw(self, indices: Tensor, generator: torch.Generator, own: slice = slice(None)) -> Tensor:
        noise = torch.randn(len(indices), *self.latent_shape, generator=generator)
        return self.x[indices[own]] + 0.1 * noise[own]


def train(objective: Objective, start: Start | None = None) -> TrainingState:
    """Train through the function that production calls."""
    with tempfile.TemporaryDirectory() as folder:
        task = Task(objective, cast(Latents, MemoryLatents()), "pinned", start)
        training = Trainer(task, Runtime(Path(folder), checkpoint_seconds=1e9)).train()
        while True:
            try:
                next(training)
            except StopIteration as end:
                return end.value.state


def train_run(settings: Mapping[str, Any], start: Start | None = None) -> TrainingState:
    """Train the run of a case."""
    complete = load_params(SMOKE).train.model_dump(mode="json")
    run = Run.model_validate(deep_merge(deep_merge(complete, RUN), dict(settings)))
    config = run_config(run, MemoryLatents.latent_shape, MemoryLatents.num_classes)
    return train(build_objective(run, config, guide()), start)


def guide() -> LatentClassifier:
    """Return an untrained classifier whose logits depend on its input: what starts at zero is drawn at random."""
    torch.manual_seed(0)
    classifier = LatentClassifier(SIZES["s4"], 4, 8, 5).requires_grad_(False)
    for parameter in classifier.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return classifier


def measure() -> Pins:
    """Train all cases and return their figures by case and part."""
    torch.set_default_dtype(torch.float64)
    try:
        states = {case: train_run(settings) for case, settings in CASES.items()}
        base = states["one_step"]
        networks = {"generator": base.ema, "discriminator": base.networks["discriminator"]}
        start = Start({name: network.state_dict() for name, network in networks.items()}, base.update)
        states["continued"] = train_run(CONTINUED, start)
        start = Start({"generator": states["flow_matching"].ema.state_dict()}, 0)
        states["continued_flow"] = train_run(ADVERSARIAL | {"flow": FLOW}, start)
        settings = Classifier.model_validate(CLASSIFIER)
        shape, classes = MemoryLatents.latent_shape, MemoryLatents.num_classes
        states["classifier"] = train(ClassifierTraining(settings, 3, shape, classes))
        return {case: figures(state) for case, state in states.items()}
    finally:
        torch.set_default_dtype(torch.float32)


def figures(state: TrainingState) -> dict[str, Any]:
    """Return what is pinned of a finished run."""
    modules = {name: figures_of(module) for name, module in state.modules.items()}
    buffers = {name: buffer.tolist() for name, buffer in state.buffers.items()}
    return modules | {"buffers": buffers, "row": state.rows[-1]}


def figures_of(module: nn.Module) -> dict[str, list[float]]:
    """Return each tensor's norm and its projection on a fixed direction."""
    found = {}
    for name, tensor in module.named_parameters():
        flat = tensor.detach().flatten()
        direction = torch.cos(torch.arange(len(flat), dtype=torch.float64)) / len(flat) ** 0.5
        found[name] = [flat.norm().item(), (flat @ direction).item()]
    return found


def differences(pinned: Any, found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield by how much figures differ where it is more than TOLERANCE, relative to the figure or a tensor's norm."""
    if isinstance(pinned, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*pinned, *found]):
            yield from differences(pinned.get(key), found.get(key), f"{name}.{key}".lstrip("."))
        return
    if pinned is None or found is None:
        yield name, float("inf")
        return
    one, other = np.atleast_1d(pinned), np.atleast_1d(found)
    scale = max(abs(one[0]), 1e-12)
    off = float(np.max(np.abs(one - other)) / scale)
    if not off <= TOLERANCE:
        yield name, off


def rounded(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    return [rounded(value) for value in found] if isinstance(found, list) else float(f"{found:.13g}")


def read_pins() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def rewrite() -> str | None:
    """Write the pins; return why not, if numbers changed under an equal version."""
    declared, found = versions("train"), measure()
    known = read_pins() if FILE.exists() else {"versions": {}, "cases": {}}
    common = {case: pins for case, pins in known["cases"].items() if case in found}
    changed = sorted({name.split(".")[0] for name, _ in differences(common, {case: found[case] for case in common})})
    if changed and known["versions"] == declared:
        return f"Numbers of {', '.join(changed)} changed: raise the version in afm_pipe/params/versions.yaml first."
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(rounded(pins))}" for case, pins in found.items())
    FILE.write_text(f'{{"versions": {json.dumps(declared)}, "cases": {{\n{lines}\n}}}}\n', encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(rewrite())
