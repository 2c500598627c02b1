"""Updates of a run, data path included, beside plain ones; where the time goes, and the bound of matrix products."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from afm_pipe.data.latents import Latents
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run
from afm_pipe.planning.counting import measure
from afm_pipe.training.engine import Engine
from afm_pipe.training.trainer import Runtime, Task, Trainer
from benchmarks.beside import Beside, Works
from benchmarks.inputs import CLASS_COUNT, latents_file, sd_vae
from benchmarks.measuring import Row, in_turns, matmul_rate, speed_row
from benchmarks.straightforward import Straightforward, online_encode

CPU = torch.device("cpu")
B2_SHAPE = (4, 32, 32)
SHOWN = 12  # operators in the table of where the time goes
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def trainer_of(
    run: Run,
    latents: Latents,
    group: ProcessGroup = SINGLE_PROCESS,
    engine: Engine = Engine(),  # noqa: B008  # an immutable value
    **how: Any,
) -> Trainer:
    """Return a trainer at its first update; it writes nothing unless its `train` runs."""
    objective = build_objective(run, run_config(run, latents.latent_shape, latents.num_classes))
    runtime = Runtime(latents.path.parent / "work", group=group, engine=engine, **how)
    return Trainer(Task(objective, latents, "benchmark"), runtime)


def one_update(trainer: Trainer, bf16: bool = False) -> None:
    """Draw a batch and update D, G and the moving average."""
    for network in trainer.state.networks.values():
        network.bf16 = bf16  # type: ignore[assignment]
    trainer.update(trainer.draw())


class PlainTraining:
    """The straightforward update on the same batches; online: from images through a VAE."""

    def __init__(self, run: Run, latents: Latents, vae: Any = None) -> None:
        self.objective = build_objective(run, run_config(run, latents.latent_shape, latents.num_classes))
        self.batches, self.num_images, self.vae = self.objective.batches(latents, CPU), latents.num_images, vae
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.step = Straightforward(run, **self.objective.build_networks())

    def update(self, online: bool = False) -> None:
        """Draw a batch and update D, G and the moving average."""
        now = self.objective.hyperparameters(self.step.count, self.num_images)
        draw = self.batches.draw(self.step.count, now)
        ((of_d,),), (of_g,) = draw.discriminator, draw.generator
        batches = of_d.batch, of_g.batch
        real = tuple(batch.real for batch in batches)
        if online:
            images = torch.rand(len(real[0]), 3, 256, 256) * 2 - 1
            real = (online_encode(self.vae, images), online_encode(self.vae, images.flip(-1)))
        sources, labels = (tuple(getattr(batch, name) for batch in batches) for name in ("source", "labels"))
        self.step.update(real, sources, labels, of_d.noise, now.weights["transport"])


@contextmanager
def plain_training(run: Run, latents: Path, vae: bool) -> Iterator[Works]:
    """Yield the works of the straightforward update, for another process."""
    plain = PlainTraining(run, Latents.open(latents), sd_vae().model if vae else None)
    yield {"plain": plain.update, "online": partial(plain.update, True)}


def b2_run(params: Params, batch_size: int = 4) -> Run:
    """Return the default's run at the paper's B/2."""
    return params.runs["t4"].model_copy(update={"size": "b2", "batch_size": batch_size})


def b2_latents(folder: Path) -> Latents:
    """Return latents of B/2's shape."""
    return latents_file(folder / "latents.h5", 512, B2_SHAPE)


def b2(params: Params, quick: bool) -> Iterator[Row]:
    """B/2 on 4 x 32 x 32 latents, batch 4: fp32, bf16, and against encoding online."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        latents, run = b2_latents(Path(folder)), b2_run(params)
        beside = stack.enter_context(Beside(plain_training, run, latents.path, True))
        config, trainer = run_config(run, B2_SHAPE, CLASS_COUNT), trainer_of(run, latents)
        update = partial(one_update, trainer)
        rates: list[float] = []
        works: dict[str, Callable[[], Any]] = {
            "matmul": lambda: rates.append(matmul_rate()),
            "fp32": update,
            "plain": lambda: beside.do("plain"),
            "bf16": partial(update, bf16=True),
            "online": lambda: beside.do("online"),
            "draw": lambda: [trainer.draw() for _ in range(5)],
        }
        seconds = in_turns(1 if quick else 2, **works)
        shape, theirs = "B/2, 4 x 32 x 32, batch 4", "straightforward update"
        yield speed_row("b2", f"{shape}, fp32", seconds, "fp32", "plain", theirs, bar=">= 1.1")
        where = list(_where("b2", shape, update))
        yield _floor_row("b2", f"{shape}, fp32", run, config, seconds["fp32"], rates, where, bar=">= 0.8")
        yield speed_row(
            "b2", f"{shape}, fp32", seconds, "fp32", "online", "the same, encoding online in bf16", bar=">= 1.4"
        )
        yield speed_row("b2", f"{shape}, bf16 autocast", seconds, "bf16", "plain", f"{theirs} in fp32", bar=">= 1.6")
        yield _wait_row("b2", shape, median(seconds["draw"]) / 5, median(seconds["fp32"]))
        yield from where


def small(params: Params, quick: bool) -> Iterator[Row]:
    """The default's own shape: 4 blocks of width 128, 4 tokens, batch 64."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = params.runs["t4"]
        latents = latents_file(Path(folder) / "latents.h5", 5000, params.latent_shape)
        config = run_config(run, params.latent_shape, CLASS_COUNT)
        trainer = trainer_of(run, latents)
        update = partial(one_update, trainer)
        beside = stack.enter_context(Beside(plain_training, run, latents.path, False))
        rates: list[float] = []
        seconds = in_turns(
            8 if quick else 40,
            warm=3,
            matmul=lambda: rates.append(matmul_rate(seconds=0.0)),
            ours=update,
            plain=lambda: beside.do("plain"),
            draw=trainer.draw,
        )
        shape = "t4, 4 x 8 x 8, batch 64"
        yield speed_row("small", f"{shape}, fp32", seconds, "ours", "plain", "straightforward update")
        where = list(_where("small", shape, update))
        yield _floor_row("small", f"{shape}, fp32", run, config, seconds["ours"], rates, where)
        yield _wait_row("small", shape, median(seconds["draw"]), median(seconds["ours"]))
        yield from where


def _floor_row(
    case: str,
    what: str,
    run: Run,
    config: ModelConfig,
    seconds: list[float],
    rates: list[float],
    operators: Sequence[Row],
    bar: str = "",
) -> Row:
    work = measure(run, config, run.batch_size)
    floor = work.flops / median(rates)
    note = (
        f"{work.units:.1f} forward passes of G and {work.flops / 1e9:,.0f} GFLOP of matrix products per update; "
        f"products of 2048 x 2048 matrices ran at {median(rates) / 1e9:.0f} GFLOP/s in between; under the profiler, "
        f"products take {_products_share(operators):.0%} of an update"
    )
    against = "its matrix products at this machine's rate"
    return Row(case, what, 1 / median(seconds), 1 / floor, "updates/s", against, floor / median(seconds), bar, note)


def _products_share(operators: Sequence[Row]) -> float:
    """Return the fraction of a profiled update spent in matrix products."""
    return sum(row.ratio for row in operators if row.what in PRODUCTS)


def _wait_row(case: str, shape: str, wait: float, update: float) -> Row:
    against = "the update it is drawn for"
    return Row(case, f"{shape}: drawing a batch", 1000 * wait, 1000 * update, "ms", against, wait / update, "<= 0.02")


def _where(case: str, shape: str, update: Callable[[], Any]) -> Iterator[Row]:
    """Profile one update; yield a row for each of the slowest operators."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update()
    spent = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in spent)
    for event in spent[:SHOWN]:
        share, own = event.self_cpu_time_total / whole, event.self_cpu_time_total / 1000
        yield Row(
            f"{case}: where",
            event.key,
            own,
            whole / 1000,
            "ms",
            f"one update of {shape}",
            share,
            note=f"{event.count} calls",
        )
