"""What a study needs before any of it is run: work, memory, days and disk of every run, estimated for a machine.

Work is counted on the meta device from the very steps that train; nothing is computed and no data is needed.

Legend: N batch of one device, C, H, W of latents.
"""

from collections.abc import Generator, Sequence
from math import prod
from typing import Literal, NamedTuple, cast, get_args

from afm_pipe.models.model_files import run_config
from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Params
from afm_pipe.planning.budget import budget
from afm_pipe.planning.counting import FLOAT, Work, guidance_flops, measure
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import Progress
from afm_pipe.runtime.tables import table_text

Precision = Literal["fp32", "tf32", "bf16"]
DAY = 86400.0  # seconds


class Gpu(NamedTuple):
    """Peaks of a GPU without sparsity, in TFLOP/s, and its memory in GB."""

    fp32: float
    tf32: float
    bf16: float
    memory: float

    def peak(self, precision: Precision) -> float:
        """Return the peak of a precision in FLOP/s."""
        return 1e12 * {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16}[precision]


# NVIDIA's data sheets of the SXM parts as others quote them; where those give only 2:4 sparse figures, half of them.
GPUS = {
    # name          fp32       tf32        bf16         memory
    "a100": Gpu(fp32=19.5, tf32=156.0, bf16=312.0, memory=80),
    "h100": Gpu(fp32=67.0, tf32=494.5, bf16=989.5, memory=80),
    "h200": Gpu(fp32=67.0, tf32=494.5, bf16=989.5, memory=141),
    "b200": Gpu(fp32=80.0, tf32=1100.0, bf16=2250.0, memory=180),
}


NOTES = (
    "All but the parameters of G and D are estimates. FLOPs are those of matrix products, counted on the training",
    "steps; G forwards are the units of the paper's Table 12. Memory is weights, gradients, optimizers and moving",
    "average in float32, and activations (in bf16 half of float32's) of the larger step, with what --micro-batch,",
    "--checkpoint-activations and --shard save; computing activations again is not counted as work. Disk is two",
    "checkpoints and the model. A guided run's row is its own phase alone. Encoding, the classifier and evaluation are",
    "left out.",
)


class Machine(NamedTuple):
    """What a study is planned for."""

    gpu: str
    gpus: int
    utilisation: float  # share of the peak that training reaches
    precision: Precision
    micro_batch: int | None = None
    checkpoint_activations: bool = False
    shard: bool = False


def machine(
    gpu: str,
    gpus: int,
    utilisation: float,
    precision: str,
    micro_batch: int | None = None,
    checkpoint_activations: bool = False,
    shard: bool = False,
) -> Machine:
    """Return a machine from a person's words. Raises UserError naming the one that is wrong."""
    if gpu not in GPUS:
        raise UserError(f"Found --gpu {gpu}, expected one of {', '.join(GPUS)}: take the most similar.")
    if gpus < 1:
        raise UserError(f"Found --gpus {gpus}, expected at least 1.")
    if not 0 < utilisation <= 1:
        raise UserError(f"Found --utilisation {utilisation:g}, expected more than 0 and at most 1.")
    if precision not in get_args(Precision):
        raise UserError(f"Found --precision {precision}, expected one of {', '.join(get_args(Precision))}.")
    return Machine(gpu, gpus, utilisation, cast(Precision, precision), micro_batch, checkpoint_activations, shard)


class Plan(NamedTuple):
    """Needs of one run; a guided run's own phase alone."""

    name: str
    generator_parameters: int
    discriminator_parameters: int
    work: Work  # of one update, over all devices
    images: int  # seen by G
    updates: int
    memory_bytes: float  # of one device
    days: float
    checkpoint_bytes: int  # two checkpoints and the model


def plan_run(params: Params, name: str, num_images: int, num_classes: int, machine: Machine) -> Plan:
    """Estimate what a run needs, on a data set of so many images and classes.

    Memory is that of one device. Raises UserError when the batch is not shared evenly.
    """
    run = params.models[name]
    if run.batch_size % machine.gpus:
        raise UserError(
            f"Found {machine.gpus} GPUs for the batch of {run.batch_size} of {name}, expected a number that divides it."
        )
    config = run_config(run, params.latent_shape, num_classes)
    share = run.batch_size // machine.gpus
    of_base = params.runs[params.guided[name].base] if name in params.guided else run
    engine = machine.micro_batch, machine.checkpoint_activations, machine.shard
    needs, work = budget(of_base, config, machine.gpus, *engine), measure(of_base, config, share)
    flops = work.flops
    if run.phases[-1].guidance is not None and params.classifier is not None:
        flops += guidance_flops(params.classifier.size, config, share)
    work = work._replace(forward_flops=work.forward_flops * machine.gpus, flops=flops * machine.gpus)
    updates = update_at(run, run.phases[-1].until_epoch, num_images)
    if name in params.guided:
        updates -= update_at(run, run.phases[-2].until_epoch, num_images)
    activations = needs.activation_bytes / (2 if machine.precision == "bf16" else 1)
    seconds = updates * work.flops / (GPUS[machine.gpu].peak(machine.precision) * machine.gpus * machine.utilisation)
    g, d = needs.generator_parameters, needs.discriminator_parameters
    return Plan(
        name=name,
        generator_parameters=g,
        discriminator_parameters=d,
        work=work,
        images=updates * run.batch_size,
        updates=updates,
        memory_bytes=needs.memory_bytes - needs.activation_bytes + activations,
        days=seconds / DAY,
        checkpoint_bytes=2 * needs.checkpoint_bytes + FLOAT * (g + d),
    )


def latents_bytes(params: Params, num_images: int) -> int:
    """Return the size of latents.h5: float16, of both mirrors with data.mirror."""
    return num_images * (2 if params.data.mirror else 1) * 2 * prod(params.latent_spec.encoded_shape)


def plan_text(
    params: Params, names: Sequence[str], machine: Machine, num_images: int, num_classes: int
) -> Generator[Progress, None, str]:
    """Return the plan of some models, or of all, as a table and what its figures rest on."""
    unknown = [name for name in names if name not in params.models]
    if unknown:
        raise UserError(f"Found no run {unknown[0]!r} in params, expected one of {', '.join(params.models)}.")
    names = names or list(params.models)
    plans = []
    for done, name in enumerate(names):
        yield Progress(done, len(names), "runs", name)
        plans.append(plan_run(params, name, num_images, num_classes, machine))
    yield Progress(len(names), len(names), "runs")
    header = ("run", "G", "D", "TFLOP/update", "G forwards", "images", "updates", "GB/device", "days", "disk GB")
    gpu = GPUS[machine.gpu]
    rows = [_row(plan, gpu) for plan in plans]
    total = sum(plan.days for plan in plans)
    disk = sum(plan.checkpoint_bytes for plan in plans) + latents_bytes(params, num_images)
    latents = latents_bytes(params, num_images) / 1e9
    stored = "moments" if params.latent_spec.stochastic else "latents"
    lines = [
        table_text(header, rows),
        f"In all about {_figure(total)} days and {_figure(disk / 1e9)} GB of disk, {_figure(latents)} of it latents"
        f" ({num_images:,} images{', both mirrors' if params.data.mirror else ''}, float16 {stored}).",
        f"On {machine.gpus} x {machine.gpu} in {machine.precision}: {gpu.peak(machine.precision) / 1e12:g} TFLOP/s each"
        f" by the data sheet (dense), of which {machine.utilisation:.0%} are assumed to be used (--utilisation).",
        *NOTES,
    ]
    crowded = [plan.name for plan in plans if plan.memory_bytes > gpu.memory * 1e9]
    if crowded:
        lines.append(
            f"! More than the {gpu.memory:g} GB of one {machine.gpu}: {', '.join(crowded)}. Take more --gpus, others, "
            "--micro-batch, --checkpoint-activations or --shard."
        )
    return "\n".join(lines)


def _row(plan: Plan, gpu: Gpu) -> list[str]:
    memory = plan.memory_bytes / 1e9
    return [
        plan.name,
        f"{plan.generator_parameters / 1e6:,.4g}M",
        f"{plan.discriminator_parameters / 1e6:,.4g}M",
        _figure(plan.work.flops / 1e12),
        f"{plan.work.units:.1f}",
        f"{_figure(plan.images / 1e6)}M",
        f"{plan.updates:,}",
        f"{_figure(memory)}{' !' if memory > gpu.memory else ''}",
        _figure(plan.days),
        _figure(plan.checkpoint_bytes / 1e9),
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"
