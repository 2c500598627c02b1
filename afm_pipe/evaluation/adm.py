"""ADM's published statistics of ImageNet, the reference of the paper's numbers.

Legend: N images of its reference batch, H x W pixels, D features.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from afm_pipe.evaluation.arrays import load_arrays
from afm_pipe.evaluation.networks import LEGACY, SPATIAL, FeatureNetwork
from afm_pipe.evaluation.statistics import TRAINING_IMAGES, Reference
from afm_pipe.params import AdmReference
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.weights import weights_file

ADM = "adm"  # `Reference.source`, followed by the hash of the file
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")


def adm_path(settings: AdmReference) -> tuple[Path, str]:
    """Return the path and the hash of the file. Raises UserError if it is missing or has another hash."""
    fix = (
        "download it from https://github.com/openai/guided-diffusion/tree/main/evaluations, correct "
        "evaluate.adm_reference, or set it to null"
    )
    return weights_file(settings.file, settings.sha256, "ADM's statistics", fix)


def require_reference(settings: AdmReference | None, reference: Reference, folder: Path) -> None:
    """Raise UserError if Inception's statistics have another source than evaluate.adm_reference."""
    expected = TRAINING_IMAGES
    if settings is not None:
        expected = f"{ADM} {settings.sha256}"
        if settings.sha256 is None:  # then the file decides, where it is present
            try:
                expected = f"{ADM} {adm_path(settings)[1]}"
            except UserError:
                expected = reference.source if reference.source.startswith(f"{ADM} ") else ADM
    if reference.source != expected:
        raise UserError(
            f"Found statistics of {reference.source} for {reference.name} in {folder}, expected those of {expected}, "
            "as evaluate.adm_reference says: build the reference again."
        )


def adm_references(
    settings: AdmReference, networks: Sequence[FeatureNetwork], references: Sequence[Reference], batch_size: int
) -> Iterator[Reference]:
    """Yield the references, those of Inception with ADM's statistics.

    ADM's mean and covariance are those of all training images. Its arr_0 (N, H, W, 3) holds some of these images, whose
    features are used for KID, precision and recall. Raises UserError for arrays of another shape.
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
            batches = np.array_split(images, max(len(images) // batch_size, 1))
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
