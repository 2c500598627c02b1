"""What a run's batches are made of, beside what tests of ranks and updates see of them."""

from pathlib import Path

import pytest
import torch

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.objectives.adversarial_flow.batches import Batches
from afm_pipe.params import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latents(discs: Path) -> Latents:
    return Latents.open(discs / "data" / "latents.h5")


def noisy(run: Run, share: float) -> Run:
    return run.model_copy(update={"label_noise": share, "batch_size": 60})


def test_label_noise_replaces_its_share_of_the_labels_and_nothing_else(latents: Latents, smoke_run: Run) -> None:
    clean, half, whole = (Batches(latents, noisy(smoke_run, share), CPU).batch("generator", 0) for share in (0, 0.5, 1))
    for batch in (half, whole):
        assert torch.equal(batch.real, clean.real)
        assert torch.equal(batch.source, clean.source)
    kept = 1 / latents.num_classes  # of random labels by chance
    found = [(batch.labels == clean.labels).float().mean() for batch in (half, whole)]
    assert found == pytest.approx([0.5 + kept / 2, kept], abs=0.25)
    assert found[0] > found[1]
    later = Batches(latents, noisy(smoke_run, 1), CPU).batch("generator", latents.num_images * 60)
    assert not torch.equal(later.labels, whole.labels), "drawn anew with every batch"


def test_label_noise_does_not_depend_on_the_number_of_ranks(latents: Latents, smoke_run: Run) -> None:
    run = noisy(smoke_run, 0.5)
    alone = Batches(latents, run, CPU).batch("discriminator", 0).labels
    for rank in (0, 1):
        assert torch.equal(
            Batches(latents, run, CPU, ProcessGroup(rank, 2)).batch("discriminator", 0).labels, alone[rank::2]
        )
