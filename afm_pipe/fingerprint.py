"""The fingerprint of a piece of work: a hash of everything that shapes its numbers.

Working state is kept under it, so state made with other params, other data or other code is never taken up.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from afm_pipe.params import Run

PACKAGE = Path(__file__).parent

# The source that shapes a training's numbers.
TRAINING_SOURCES = (
    "data/latents.py",
    "data/order.py",
    "evaluation/measures.py",
    "models/classifier.py",
    "models/discriminator.py",
    "models/dit.py",
    "models/flow.py",
    "models/generator.py",
    "models/sizes.py",
    "ranks.py",
    "training",
)

# The source that shapes what is measured of a trained model.
MEASURING_SOURCES = ("evaluation", "models/flow.py", "sampling.py", "study")


def training_identity(run: Run, latent_shape: tuple[int, ...], latents: str, origins: dict[str, str]) -> str:
    """Return the fingerprint of a training: its params, the latents' own, and the hashes of what it starts from."""
    settings = {"run": run.model_dump(mode="json"), "latent_shape": latent_shape}
    return fingerprint(settings, {"latents": latents, **origins}, TRAINING_SOURCES)


def fingerprint(settings: Any, inputs: dict[str, str], sources: tuple[str, ...]) -> str:
    """Return 16 hex digits over settings (as JSON), named hashes of inputs, and source files or folders."""
    digest = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode())
    for source in sources:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
