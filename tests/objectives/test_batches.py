"""The batches of a run: label noise, times, penalized images and micro-batches."""

from pathlib import Path

import pytest
import torch

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import ProcessGroup
from afm_pipe.objectives.adversarial_flow.batches import AdversarialBatches, DiscriminatorPart, draw_times
from afm_pipe.objectives.base import Hyperparameters, num_micro_batches
from afm_pipe.params import Run
from afm_pipe.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latents(discs: Path) -> Latents:
    return Latents.open(discs / "data" / "latents.h5")


def noisy(run: Run, share: float) -> Run:
    return run.model_copy(update={"label_noise": share, "batch_size": 60})


def batches(latents: Latents, run: Run, group: ProcessGroup = ProcessGroup(), micro_batch: int | None = None):  # noqa: B008
    return AdversarialBatches(latents, run, None, CPU, group, micro_batch)


def test_label_noise_replaces_its_share_of_the_labels_and_nothing_else(latents: Latents, smoke_run: Run) -> None:
    clean, half, whole = (batches(latents, noisy(smoke_run, share)).batch("generator", 0) for share in (0.0, 0.5, 1.0))
    for batch in (half, whole):
        assert torch.equal(batch.real, clean.real)
        assert torch.equal(batch.source, clean.source)
    kept = 1 / latents.num_classes  # of random labels by chance
    found = [(batch.labels == clean.labels).float().mean() for batch in (half, whole)]
    assert found == pytest.approx([0.5 + kept / 2, kept], abs=0.25)
    assert found[0] > found[1]
    later = batches(latents, noisy(smoke_run, 1.0)).batch("generator", latents.num_images * 60)
    assert not torch.equal(later.labels, whole.labels), "drawn anew with every batch"


def test_label_noise_does_not_depend_on_the_number_of_processes(latents: Latents, smoke_run: Run) -> None:
    run = noisy(smoke_run, 0.5)
    alone = batches(latents, run).batch("discriminator", 0).labels
    for rank in (0, 1):
        found = batches(latents, run, ProcessGroup(rank, 2)).batch("discriminator", 0).labels
        assert torch.equal(found, alone[rank::2])


def whole(parts: list[list[DiscriminatorPart]], field: str) -> torch.Tensor:
    """Put a tensor of D's batch together again from the micro-batches of all processes."""
    of_rank = []
    for of_process in parts:
        shards = [getattr(part.batch, field) for part in of_process]
        joined = torch.empty(sum(map(len, shards)), *shards[0].shape[1:], dtype=shards[0].dtype)
        for index, shard in enumerate(shards):
            joined[index :: len(shards)] = shard
        of_rank.append(joined)
    found = torch.empty(sum(map(len, of_rank)), *of_rank[0].shape[1:], dtype=of_rank[0].dtype)
    for rank, joined in enumerate(of_rank):
        found[rank :: len(of_rank)] = joined
    return found


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 5), (2, None), (3, 2)])
def test_processes_and_micro_batches_share_one_batch_and_its_penalized_images(
    latents: Latents, smoke_run: Run, world_size: int, micro_batch: int | None
) -> None:
    run = smoke_run.model_copy(update={"batch_size": 12, "nfe": 2, "form": "residual"})
    now = Hyperparameters({}, {}, phase=run.phases[0])
    ((alone,),) = batches(latents, run).draw(7, now).discriminator
    groups = [ProcessGroup(rank, world_size) for rank in range(world_size)]
    parts = [list(batches(latents, run, group, micro_batch).draw(7, now).discriminator[0]) for group in groups]
    for field in ("real", "source", "labels", "s", "t"):
        assert torch.equal(whole(parts, field), getattr(alone.batch, field)), field
    assert alone.noise is not None
    every = [part for of_process in parts for part in of_process]
    assert all(len(part.batch.real) <= (micro_batch or 12) for part in every)
    assert sum(part.share for part in every) == pytest.approx(1)
    assert sum(part.penalized_share for part in every) == pytest.approx(1)
    noises = {tuple(noise.flatten().tolist()) for part in every if part.noise for noise in part.noise.real}
    assert noises == {tuple(noise.flatten().tolist()) for noise in alone.noise.real}
    # A part's penalized images are its first ones, since penalties take the first of D's batch.
    first = [image for part in every if part.noise for image in part.batch.real[: len(part.noise.real)]]
    penalized = alone.batch.real[: len(alone.noise.real)]
    assert {tuple(image.flatten().tolist()) for image in first} == {tuple(x.flatten().tolist()) for x in penalized}


def test_lazy_penalties_are_left_out_of_the_updates_between(latents: Latents, smoke_run: Run) -> None:
    lazy = smoke_run.model_copy(update={"penalty": smoke_run.penalty.model_copy(update={"every": 3})})
    now = Hyperparameters({}, {}, phase=lazy.phases[0])
    drawn = [batches(latents, lazy).draw(update, now).discriminator[0][0] for update in range(4)]
    assert [part.noise is None for part in drawn] == [False, True, True, False]


def test_each_step_of_the_discriminator_has_a_batch_of_its_own(latents: Latents, smoke_run: Run) -> None:
    several = smoke_run.model_copy(update={"discriminator_updates": 3, "batch_size": 8})
    now = Hyperparameters({}, {}, phase=several.phases[0])
    drawn = [batches(latents, several).draw(update, now) for update in range(2)]
    steps = [parts[0].batch for each in drawn for parts in each.discriminator]
    assert len({tuple(step.source.flatten().tolist()) for step in steps}) == 6
    alone = batches(latents, several.model_copy(update={"discriminator_updates": 1}))
    for place, step in enumerate(steps):  # one order of images and noise, however many steps an update has
        assert torch.equal(step.real, alone.draw(place, now).discriminator[0][0].batch.real)
    assert torch.equal(drawn[1].generator[0].batch.real, alone.draw(1, now).generator[0].batch.real)


def test_micro_batches_are_never_empty_and_processes_never_idle() -> None:
    assert [num_micro_batches(12, 3, size) for size in (None, 1, 2, 3, 4, 9)] == [1, 4, 2, 2, 1, 1]
    assert num_micro_batches(5, 4, 1) == 1, "one process has two images, three have one"
    with pytest.raises(UserError, match="Found 5 processes for a batch of 4 images"):
        num_micro_batches(4, 5, None)


def test_fixed_times_are_neighbors_on_the_grid_and_any_times_are_ordered() -> None:
    s, t = draw_times(4, 1000, torch.Generator().manual_seed(0))
    assert set(s.tolist()) == {0.25, 0.5, 0.75, 1.0}
    assert torch.equal(s - t, torch.full((1000,), 0.25))
    s, t = draw_times("any", 1000, torch.Generator().manual_seed(0))
    assert ((t >= 0) & (t <= s) & (s <= 1)).all()
    assert s.mean().item() == pytest.approx(0.5, abs=0.05)
    assert t.mean().item() == pytest.approx(0.25, abs=0.05)
