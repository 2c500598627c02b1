"""A generator whose best evaluation is known: the real images of these tests are its own samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from afm_pipe.data.manifest import Manifest
from afm_pipe.evaluation.evaluator import Evaluator
from afm_pipe.evaluation.features import load_networks
from afm_pipe.evaluation.networks import FeatureNetwork
from afm_pipe.params import Params, deep_merge
from afm_pipe.runtime.progress import track
from afm_pipe.sampling.sampler import Sampler
from tests.conftest import ROOT

CLASSES = ["ant", "bee", "cow"]
REAL_SEED = 1000
SHAPE = (4, 4, 4)
MICRO_BATCH = 20


class Painter(nn.Module):
    """Paints class prototypes, varied by its noise."""

    nfe = 1

    def __init__(self, spread: float = 0.5, shift: int = 0) -> None:
        super().__init__()
        self.prototypes = 2 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
        self.spread, self.shift = spread, shift

    def sample(self, x: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        return self.prototypes[(labels + self.shift) % 3] + self.spread * x

    def num_steps(self, steps: int | None) -> int:
        return steps or 1


class Batchwise(Painter):
    """Exaggerates rounding: a sample depends slightly on its position in the batch and on the batch size."""

    def sample(self, x: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        return super().sample(x, labels) + 0.01 * torch.arange(len(x)).view(-1, 1, 1, 1) / len(x)


def params_with(**changes: Any) -> Params:
    small = {
        "data": {"image_size": 16, "min_images": 1},
        "reference": {"classifier": {"widths": [8, 16], "features": 8, "epochs": 8, "lr": 5e-3}, "thumbnails": 200},
        "sample": {"per_class": 4, "classes": 3, "micro_batch": MICRO_BATCH},
        "evaluate": {
            "samples": 240,
            "seed": 2000,
            "features": ["classifier"],
            "kid_subsets": 10,
            "kid_subset_size": 100,
            "adm_reference": None,
        },
    }
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    return Params.model_validate(deep_merge(deep_merge(raw, small), changes))


def manifest_of(labels: np.ndarray, classes: Sequence[str] = CLASSES) -> Manifest:
    return Manifest(Path(), tuple(classes), (), labels, (), "digest")


def load_network(name: str, reference: Path = Path()) -> FeatureNetwork:
    return load_networks(params_with().evaluate, reference, names=[name])[0]


def sampler_of(generator: nn.Module, vae: Any, **more: Any) -> Sampler:
    return Sampler(generator, vae, SHAPE, CLASSES, MICRO_BATCH, **more)  # type: ignore[arg-type]


def evaluate(generator: nn.Module, vae: Any, reference: Path, **changes: Any) -> dict[str, Any]:
    run = Evaluator(params_with(**changes), reference).evaluate(sampler_of(generator, vae), {"run": "painter"})
    metrics = track("evaluate", run)
    assert metrics is not None
    return metrics
