"""Estimate work, time, memory and disk of every run of a study on a machine.

Legend: N images of a batch, n GPUs; C, H, W of latents.
"""

from collections.abc import Generator, Sequence
from math import prod
from typing import NamedTuple

from afm_pipe.models.model_files import run_config
from afm_pipe.objectives.base import num_micro_batches
from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Params
from afm_pipe.planning.budget import Budget, budget, largest_part
from afm_pipe.planning.counting import Work, guidance_flops, measure
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress
from afm_pipe.runtime.tables import table_text

PRECISIONS = ("fp32", "tf32", "bf16")
DAY = 86400.0  # seconds
IMAGENET_IMAGES = 1_281_167  # of the training set
LARGE_LATENTS = 2e11  # bytes
NODE = 8  # GPUs of a machine
LINK_UTILIZATION = 0.8
NETWORK = NODE * 50.0  # GB/s out of a machine: one 400 Gb/s network card per GPU


class Gpu(NamedTuple):
    """Dense peaks in TFLOP/s, memory in GB, and NVLink bandwidth in each direction in GB/s."""

    fp32: float
    tf32: float
    bf16: float
    memory: float
    link: float


# NVIDIA's data sheets of the SXM parts; half of the figure where only the one for 2:4 sparsity is given.
GPUS = {
    # name          fp32       tf32        bf16         memory      link
    "a100": Gpu(fp32=19.5, tf32=156.0, bf16=312.0, memory=80, link=300),
    "h100": Gpu(fp32=67.0, tf32=494.5, bf16=989.5, memory=80, link=450),
    "h200": Gpu(fp32=67.0, tf32=494.5, bf16=989.5, memory=141, link=450),
    "b200": Gpu(fp32=80.0, tf32=1100.0, bf16=2250.0, memory=180, link=900),
}

# From the published rates below to what fused kernels and overlap may add; of float32 without tensor cores, assumed.
UTILIZATIONS = {"fp32": (0.3, 0.6), "tf32": (0.10, 0.25), "bf16": (0.15, 0.35)}
PUBLISHED = (
    "Published for DiT-XL/2: 12 % of TF32 (DiT's repository, 8 A100, encoding online), 24 % of fp16 (fast-DiT, one "
    "A100), 20.5 % of bf16 (LightningDiT, 8 H800)."
)

NOTES = (
    "Everything but the parameter counts is an estimate. FLOPs are those of the matrix products of the training step;",
    "G forwards are the unit of the paper's Table 12. Days include summing the gradients, not overlapped. Memory holds",
    "weights, gradients, optimizers and EMA in float32, the activations of the larger step (0.7 times in bf16, but for",
    "penalties in float32) with --micro-batch, --checkpoint-activations and --shard, and a margin for fragmentation.",
    "With several micro-batches G runs forward once more; recomputed activations do not count as work.",
    "Disk holds two checkpoints and the model. The row of a guided run is its guided phase. Encoding, the classifier,",
    "the trials of tables and evaluation are not included.",
)


class Machine(NamedTuple):
    """GPUs and launch settings to plan for."""

    gpu: str
    gpus: int
    utilization: float  # fraction of the peak that training reaches at best
    precision: str
    micro_batch: int | None = None
    checkpoint_activations: bool = False
    shard: bool = False
    least_utilization: float | None = None

    @property
    def peak(self) -> float:
        """Peak of one GPU in FLOP/s."""
        return 1e12 * float(getattr(GPUS[self.gpu], self.precision))

    def compute_seconds(self, flops: float) -> float:
        """Return the seconds of `flops` over all GPUs."""
        return flops / (self.gpus * self.utilization * self.peak)

    def reduce_seconds(self, gradient_bytes: float) -> float:
        """Return the seconds of a ring all-reduce, which sends 2 (n - 1) / n of the bytes through every GPU."""
        link = GPUS[self.gpu].link
        rate = 1e9 * LINK_UTILIZATION * (link if self.gpus <= NODE else min(link, NETWORK))
        return 2 * (self.gpus - 1) / self.gpus * gradient_bytes / rate


def check_machine(machine: Machine) -> None:
    """Raise UserError naming the command-line value that is wrong."""
    if machine.gpu not in GPUS:
        raise UserError(f"Found --gpu {machine.gpu}, expected one of {', '.join(GPUS)}: choose the most similar.")
    if machine.gpus < 1:
        raise UserError(f"Found --gpus {machine.gpus}, expected at least 1.")
    if not 0 < machine.utilization <= 1:
        raise UserError(f"Found --utilization {machine.utilization:g}, expected more than 0 and at most 1.")
    if machine.precision not in PRECISIONS:
        raise UserError(f"Found --precision {machine.precision}, expected one of {', '.join(PRECISIONS)}.")


class Plan(NamedTuple):
    """Needs of one run on a machine; of a guided run, only its guided phase."""

    name: str
    machine: Machine
    budget: Budget  # of one GPU
    work: Work  # of one update, over all GPUs
    updates: int
    images: int  # seen by G

    @property
    def compute_seconds(self) -> float:
        """Compute seconds of an update."""
        return self.machine.compute_seconds(self.work.flops)

    @property
    def reduce_seconds(self) -> float:
        """Seconds of the gradient all-reduce of an update, without overlap."""
        return self.machine.reduce_seconds(self.budget.gradient_bytes)

    @property
    def days(self) -> float:
        """Days of the run."""
        return self.updates * (self.compute_seconds + self.reduce_seconds) / DAY

    @property
    def most_days(self) -> float:
        """Days of the run at the least utilization."""
        least = self.machine.least_utilization
        return self.days if least is None else self._replace(machine=self.machine._replace(utilization=least)).days

    @property
    def disk_bytes(self) -> int:
        """Two checkpoints and the model."""
        return 2 * self.budget.checkpoint_bytes + self.budget.gradient_bytes  # a model is as large as the gradients


def plan_run(params: Params, name: str, num_images: int, num_classes: int, machine: Machine) -> Plan:
    """Estimate what a run needs on a data set. Raises UserError when the GPUs do not divide the batch."""
    run = params.model(name)
    if run.batch_size % machine.gpus:
        raise UserError(
            f"Found {machine.gpus} GPUs for the batch of {run.batch_size} of {name}, expected a divisor of the batch: "
            "choose another --gpus."
        )
    config = run_config(run, params.latent_shape, num_classes)
    phase_of = params.run_before(name)
    unguided = phase_of or run
    unguided = unguided.model_copy(update={"precision": "bf16" if machine.precision == "bf16" else "fp32"})
    images, penalized = largest_part(unguided, machine.gpus)
    work = measure(unguided, config, images, penalized)
    flops = work.flops
    if run.objective == "adversarial_flow" and num_micro_batches(run.batch_size, machine.gpus, machine.micro_batch) > 1:
        flops += work.forward_flops  # G's second forward pass of every micro-batch
    if run.phases[-1].guidance is not None and params.classifier is not None:
        flops += guidance_flops(params.classifier.size, config, images)
    updates = update_at(run, run.phases[-1].until_epoch, num_images)
    if phase_of is not None:
        updates -= update_at(run, run.phases[-2].until_epoch, num_images)
    settings = machine.micro_batch, machine.checkpoint_activations, machine.shard
    return Plan(
        name=name,
        machine=machine,
        budget=budget(unguided, config, machine.gpus, *settings),
        work=work._replace(forward_flops=work.forward_flops * machine.gpus, flops=flops * machine.gpus),
        updates=updates,
        images=updates * run.batch_size,
    )


def latents_bytes(params: Params, num_images: int) -> int:
    """Return the size of latents.h5: a row per image, two with data.mirror."""
    return num_images * (2 if params.data.mirror else 1) * row_bytes(params)


def _large_latents(params: Params, num_images: int) -> list[str]:
    """Return a line on latents of which a disk may be short: their size with and without mirrors."""
    row, (channels, height, width) = num_images * row_bytes(params), params.latent_spec.encoded_shape
    if 2 * row < LARGE_LATENTS:
        return []
    chosen = "data.mirror: false halves them" if params.data.mirror else "data.mirror: true doubles them"
    return [
        f"latents.h5 of {channels} x {height} x {width}: {rounded(2 * row / 1e12)} TB with mirrors, "
        f"{rounded(row / 1e12)} TB without; {chosen}."
    ]


def row_bytes(params: Params) -> int:
    """Return the size of one row of latents.h5, in float16."""
    return 2 * prod(params.latent_spec.encoded_shape)


def plan_text(
    params: Params, names: Sequence[str], machine: Machine, num_images: int, num_classes: int
) -> Generator[Progress, None, str]:
    """Return a table of the plans of the named models, by default all, and its assumptions. Raises UserError."""
    check_machine(machine)
    names = names or list(params.models)
    for name in names:
        params.model(name)  # report an unknown name before counting
    plans = []
    for done, name in enumerate(names):
        yield Progress(done, len(names), "runs", name)
        plans.append(plan_run(params, name, num_images, num_classes, machine))
    yield Progress(len(names), len(names), "runs")
    networks = list({name: None for plan in plans for name in plan.budget.parameters})
    header = ("run", *networks, "TFLOP/update", "G forwards", "images", "updates", "GB/device", "days", "disk GB")
    capacity, latents = GPUS[machine.gpu].memory, latents_bytes(params, num_images)
    days = span(sum(plan.days for plan in plans), sum(plan.most_days for plan in plans))
    disk = sum(plan.disk_bytes for plan in plans) + latents
    least = machine.least_utilization
    reached = f"{machine.utilization:.0%}" if least is None else f"{least:.0%} to {machine.utilization:.0%}"
    stored = "moments" if params.latent_spec.stochastic else "latents"
    lines = [
        table_text(header, [_row(plan, networks, capacity) for plan in plans]),
        f"Total: about {days} days and {rounded(disk / 1e9)} GB of disk, {rounded(latents / 1e9)} for latents "
        f"({num_images:,} images{', both mirrors' if params.data.mirror else ''}, float16 {stored}).",
        *_large_latents(params, num_images),
        f"On {machine.gpus} x {machine.gpu} in {machine.precision}: {machine.peak / 1e12:g} TFLOP/s each by the data "
        f"sheet (dense), of which {reached} is assumed to be reached (--utilization; --measure measures it).",
        *([PUBLISHED] if machine.least_utilization is not None else []),
        *NOTES,
    ]
    crowded = [plan.name for plan in plans if plan.budget.memory_bytes > capacity * 1e9]
    if crowded:
        lines.append(
            f"! More than the {capacity:g} GB of one {machine.gpu}: {', '.join(crowded)}. Use more or larger GPUs, "
            "--micro-batch, --checkpoint-activations or --shard."
        )
    return "\n".join(lines)


def _row(plan: Plan, networks: Sequence[str], capacity: float) -> list[str]:
    memory, parameters = plan.budget.memory_bytes / 1e9, plan.budget.parameters
    return [
        plan.name,
        *(f"{parameters[name] / 1e6:,.4g}M" if name in parameters else "" for name in networks),
        rounded(plan.work.flops / 1e12),
        f"{plan.work.units:.1f}",
        f"{rounded(plan.images / 1e6)}M",
        f"{plan.updates:,}",
        f"{rounded(memory)}{' !' if memory > capacity else ''}",
        span(plan.days, plan.most_days),
        rounded(plan.disk_bytes / 1e9),
    ]


def span(least: float, most: float) -> str:
    """Return a range of estimates, or one value."""
    return rounded(least) if rounded(least) == rounded(most) else f"{rounded(least)} to {rounded(most)}"


def rounded(value: float) -> str:
    """Return an estimate with two or three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"
