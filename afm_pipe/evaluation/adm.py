"""ADM's published statistics of ImageNet, against which the paper's numbers are measured.

Shapes: N images of its reference batch, H x W pixels, D features.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from afm_pipe.evaluation.nearest import load_arrays
from afm_pipe.evaluation.networks import LEGACY, SPATIAL, FeatureNetwork
from afm_pipe.evaluation.statistics import OWN, Reference
from afm_pipe.params import AdmReference
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file

ADM = "adm"  # the source of such statistics, before the hash of their file
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")


def adm_path(settings: AdmReference) -> tuple[Path, str]:
    """Return where the file is and its hash. Raises UserError when it is missing or another."""
    path = Path(os.environ.get("AFM_WEIGHTS", "weights")) / settings.file
    if not path.is_file():
        raise UserError(
            f"Found no {path}, expected ADM's statistics as evaluate.adm_reference says: download them from "
            "https://github.com/openai/guided-diffusion/tree/main/evaluations, or set evaluate.adm_reference to null."
        )
    found = sha256_file(path)
    if settings.sha256 not in (None, found):
        raise UserError(
            f"Found {path} with sha256 {found}, expected {settings.sha256}: put that file there, or mend "
            "evaluate.adm_reference.sha256."
        )
    return path, found


def require_reference(settings: AdmReference | None, reference: Reference, folder: Path) -> None:
    """Raise UserError for statistics of Inception that are not those params name: another file's, or our own."""
    expected = OWN
    if settings is not None:
        path = Path(os.environ.get("AFM_WEIGHTS", "weights")) / settings.file
        sha256 = settings.sha256 or (sha256_file(path) if path.is_file() else None)
        expected = f"{ADM} {sha256}" if sha256 else ADM  # any hash will do where none is known
    if reference.source != expected and not (expected == ADM and reference.source.startswith(f"{ADM} ")):
        raise UserError(
            f"Found statistics of {reference.source} for {reference.name} in {folder}, expected those of {expected}, "
            "as evaluate.adm_reference says: build the reference again."
        )


def adm_references(
    settings: AdmReference, networks: Sequence[FeatureNetwork], references: Sequence[Reference], size: int
) -> Iterator[Reference]:
    """Yield the references with ADM's statistics in place of our own, for the networks they are of.

    Its mean and covariance are of all training images, its arr_0 (N, H, W, 3) of some, whose features take the place of
    ours for KID, precision and recall. Raises UserError for arrays of another shape.
    """
    path, sha256 = adm_path(settings)
    arrays = load_arrays(path, ARRAYS)
    images = arrays["arr_0"]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise UserError(f"Found arr_0 {images.shape} {images.dtype} in {path}, expected (N, H, W, 3) uint8.")
    for network, reference in zip(networks, references, strict=True):
        if network.name not in (LEGACY, SPATIAL):
            yield reference
            continue
        mu, sigma = (arrays[key] for key in (("mu", "sigma") if network.name == LEGACY else ("mu_s", "sigma_s")))
        if (
            mu.shape != (network.dim,)
            or sigma.shape != (network.dim, network.dim)
            or {mu.dtype.kind, sigma.dtype.kind} != {"f"}
        ):
            raise UserError(f"Found mean {mu.shape} in {path}, expected ({network.dim},) for {network.name}.")
        features = reference.features
        if network.name == LEGACY:
            batches = np.array_split(images, max(len(images) // size, 1))
            features = np.concatenate(
                [network(torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()).numpy() for batch in batches]
            )
        yield dataclasses.replace(
            reference,
            source=f"{ADM} {sha256}",
            mu=mu.astype(np.float64),
            sigma=sigma.astype(np.float64),
            features=features,
        )
