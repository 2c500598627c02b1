"""One distance of a generator in training, for the choice of its best moving average."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.data.classes import require_same_classes
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.evaluation.features import load_networks
from afm_pipe.evaluation.frechet import Statistics, frechet_distance
from afm_pipe.evaluation.reference import SUMMARY, class_counts
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.params import Params
from afm_pipe.runtime.files import read_json
from afm_pipe.sampling.sampler import Sampler, labels_in_shares

APART = 1 << 32  # between the seeds of these samples and of the evaluation's


class SampleDistance:
    """The Frechet distance of `samples` samples in the first network of evaluate.features.

    The samples are none of those that are evaluated: what is chosen on a sample looks better on it than it is.
    """

    def __init__(
        self,
        params: Params,
        reference_dir: Path,
        autoencoder: Autoencoder,
        class_names: list[str],
        samples: int,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Load network and statistics. Raises UserError when they are missing, another's, or of other classes."""
        settings, summary = params.evaluate, read_json(reference_dir / SUMMARY)
        require_same_classes(class_names, "the latents", summary["classes"], reference_dir / SUMMARY)
        self.network = load_networks(settings, reference_dir, device, settings.features[:1])[0]
        self.reference = Reference.load(reference_dir, self.network)
        self.labels = labels_in_shares(samples, class_counts(params, summary, self.reference, reference_dir))
        self.seed = settings.seed + APART
        self.common: dict[str, Any] = {
            "autoencoder": autoencoder,
            "latent_shape": params.latent_shape,
            "class_names": class_names,
            "micro_batch": params.sample.micro_batch,
            "device": device,
            "group": group,
        }

    def __call__(self, generator: Any) -> float:
        """Return the distance of a generator's samples, on the main process; the others compute a share of them."""
        statistics = Statistics.none(self.network.dim)
        for images in Sampler(generator=generator, **self.common).stream(self.labels, self.seed):
            statistics += Statistics.of(self.network(images).numpy())
        if not self.common["group"].is_main_process:
            return np.inf
        return frechet_distance(statistics.mu, statistics.sigma, self.reference.mu, self.reference.sigma)[0]
