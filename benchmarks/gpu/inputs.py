"""Made inputs of the checks: a run, latents in memory, trainers, and the page of results.

AFM_GPU_CHECKS=cpu runs the checks that need no card on a CPU, in small sizes, to test the checks themselves.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.model_files import run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import LatentSpec, Run
from afm_pipe.params.sizes import SIZES, ModelSize
from afm_pipe.training.engine import Engine
from afm_pipe.training.trainer import Runtime, Task, Trainer

HERE = Path(__file__).parent
ON_CPU = os.environ.get("AFM_GPU_CHECKS") == "cpu"
CARD = torch.device("cuda" if torch.cuda.is_available() and not ON_CPU else "cpu")
SHAPE, CLASSES, IMAGES = ((4, 8, 8), 10, 512) if ON_CPU else ((4, 32, 32), 1000, 4096)
SIZES["wide"] = ModelSize(2, 64, 4, 2) if ON_CPU else ModelSize(2, 1152, 16, 2)  # XL's width, two blocks
XL = "wide" if ON_CPU else "xl2"
VIEWS = {"probability": 0.5, "translate": 0.125, "erasings": 3, "area": (0.02, 0.4)}
FORMS: dict[str, dict[str, Any]] = {
    "one step": {},
    "several steps": {"nfe": 2},
    "guided": {"guidance": {"scale": 0.003, "t": [0.0, 1.0]}, "augment": VIEWS},
}


class MemoryLatents(Latents):
    """Random latents in memory."""

    def read(self, indices: Any, mirrors: Any) -> Tensor:
        """Return rows (B, e, h, w) that depend on the index only."""
        return self.rows[torch.as_tensor(np.asarray(indices)) % len(self.rows)]

    @property
    def rows(self) -> Tensor:
        """The first rows, which repeat."""
        if "made" not in self.__dict__:
            generator = torch.Generator().manual_seed(0)
            made = torch.randn(64, *self.spec.encoded_shape, generator=generator)
            object.__setattr__(self, "made", made)
        return self.__dict__["made"]


def latents() -> Latents:
    """Return latents in memory."""
    labels, names = np.arange(IMAGES) % CLASSES, tuple(map(str, range(CLASSES)))
    return MemoryLatents(Path(), LatentSpec(SHAPE, False, 1.0), labels, names, {}, 1, 0)


def run_of(size: str = "wide", form: str = "one step", **changes: Any) -> Run:
    """Return the paper's settings for a size and form."""
    settings = json.loads((HERE / "run.json").read_text())
    phase = {name: value for name, value in FORMS[form].items() if name in ("guidance", "augment")}
    settings |= {name: value for name, value in FORMS[form].items() if name not in phase} | changes
    run = Run.model_validate(settings | {"phases": [settings["phases"][0] | phase]})
    return run.model_copy(update={"size": size})


def trainer_of(
    folder: Path,
    run: Run,
    engine: Engine = Engine(),  # noqa: B008  # an immutable value
    group: ProcessGroup = SINGLE_PROCESS,
    **how: Any,
) -> Trainer:
    """Return a trainer on the card at its first update, with networks whose blocks do something."""
    guide = LatentClassifier(SIZES["wide"], *SHAPE[:2], CLASSES).requires_grad_(False).to(CARD) if run.guided else None
    objective = build_objective(run, run_config(run, SHAPE, CLASSES), guide)
    trainer = Trainer(Task(objective, latents(), "check"), Runtime(folder, CARD, group=group, engine=engine, **how))
    trainer.callbacks.clear()  # the monitor's probe is not what is checked
    torch.manual_seed(1)
    with torch.no_grad():
        for network in trainer.state.networks.values():
            for name, weight in network.named_parameters():
                if ("adaLN" in name or "final_layer" in name) and not trainer.state.is_sharded:
                    weight.add_(0.02 * torch.randn(weight.shape).to(CARD))
    return trainer


def card_name() -> str:
    """Return the name of the card, or of what stands for it."""
    return torch.cuda.get_device_name() if CARD.type == "cuda" else "no GPU"


def write_page(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Replace a part of the card's page by a table; return the page."""
    page = HERE / f"{re.sub(r'[^A-Za-z0-9]+', '-', card_name()).strip('-')}.md"
    before = page.read_text() if page.exists() else f"# {card_name()}, torch {torch.__version__}\n"
    kept = re.sub(rf"\n## {title}\n.*?(?=\n## |\Z)", "", before, flags=re.DOTALL).rstrip("\n")
    table = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
    page.write_text(f"{kept}\n\n## {title}\n\n{table}\n")
    return page
