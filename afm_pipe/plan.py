"""What a study needs before any of it is run: work, memory, days and disk of every run, estimated for a machine.

Work is counted on the meta device from the very steps that train; nothing is computed and no data is needed.

Legend: N batch of one device, C, H, W of latents.
"""

from collections.abc import Callable, Generator, Sequence
from functools import cache
from math import prod
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from afm_pipe.console import Tick, table_text
from afm_pipe.errors import UserError
from afm_pipe.models.checkpoint_format import (
    ModelConfig,
    build_discriminator,
    build_generator,
    count_parameters,
    run_config,
)
from afm_pipe.models.classifier import LatentClassifier
from afm_pipe.models.flow import Flow
from afm_pipe.models.sizes import SIZES
from afm_pipe.params import Params, Run
from afm_pipe.training.budget import D_COPIES, FLOAT, G_COPIES, RUNTIME
from afm_pipe.training.schedules import update_at
from afm_pipe.training.step import Batch, PenaltyNoise, discriminator_step, generator_step

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
    "average in float32 on every device, and activations (in bf16 half of float32's) without checkpointing; disk is",
    "two checkpoints and the model. A guided run's row is its own phase alone. Encoding, the classifier and evaluation",
    "are left out.",
)


class Machine(NamedTuple):
    """What a study is planned for."""

    gpu: str
    gpus: int
    utilisation: float  # share of the peak that training reaches
    precision: Precision


def machine(gpu: str, gpus: int, utilisation: float, precision: str) -> Machine:
    """Return a machine from a person's words. Raises UserError naming the one that is wrong."""
    if gpu not in GPUS:
        raise UserError(f"Found --gpu {gpu}, expected one of {', '.join(GPUS)}: take the most similar.")
    if gpus < 1:
        raise UserError(f"Found --gpus {gpus}, expected at least 1.")
    if not 0 < utilisation <= 1:
        raise UserError(f"Found --utilisation {utilisation:g}, expected more than 0 and at most 1.")
    if precision not in get_args(Precision):
        raise UserError(f"Found --precision {precision}, expected one of {', '.join(get_args(Precision))}.")
    return Machine(gpu, gpus, utilisation, cast(Precision, precision))


class Work(NamedTuple):
    """One update of D and one of G on a batch; a multiplication and an addition are two FLOPs."""

    forward_flops: float  # of G on the batch: the unit of paper Table 12
    flops: float
    activation_bytes: float  # kept for the backward pass, at the larger of the two steps; float32
    parts: "Parts"  # of flops

    @property
    def units(self) -> float:
        """The work in forward passes of G."""
        return self.flops / self.forward_flops


class Parts(NamedTuple):
    """FLOPs of an update by network and direction, the steps of D and G together."""

    generator_forward: float
    generator_backward: float
    discriminator_forward: float
    discriminator_backward: float


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

    Memory is that of data parallel training: everything but the batch is on every device. Raises UserError when the
    batch is not shared evenly.
    """
    run = params.models[name]
    if run.batch_size % machine.gpus:
        raise UserError(
            f"Found {machine.gpus} GPUs for the batch of {run.batch_size} of {name}, expected a number that divides it."
        )
    config = run_config(run, params.latent_shape, num_classes)
    with torch.device("meta"):
        generator, discriminator = build_generator(config), build_discriminator(config)
    g, d = count_parameters(generator), count_parameters(discriminator)
    share = run.batch_size // machine.gpus
    of_base = params.runs[params.guided[name].base] if name in params.guided else run
    work = measure(of_base, config, share)
    flops = work.flops
    if run.phases[-1].guidance is not None and params.classifier is not None:
        flops += guidance_flops(params.classifier.size, config, share)
    work = work._replace(forward_flops=work.forward_flops * machine.gpus, flops=flops * machine.gpus)
    updates = update_at(run, run.phases[-1].until_epoch, num_images)
    if name in params.guided:
        updates -= update_at(run, run.phases[-2].until_epoch, num_images)
    activations = work.activation_bytes / (2 if machine.precision == "bf16" else 1)
    seconds = updates * work.flops / (GPUS[machine.gpu].peak(machine.precision) * machine.gpus * machine.utilisation)
    checkpoint = FLOAT * ((G_COPIES - 1) * g + (D_COPIES - 1) * d)
    return Plan(
        name=name,
        generator_parameters=g,
        discriminator_parameters=d,
        work=work,
        images=updates * run.batch_size,
        updates=updates,
        memory_bytes=FLOAT * (G_COPIES * g + D_COPIES * d) + activations + RUNTIME,
        days=seconds / DAY,
        checkpoint_bytes=2 * checkpoint + FLOAT * (g + d),
    )


def latents_bytes(params: Params, num_images: int) -> int:
    """Return the size of latents.h5: mean and deviation in float16, of both mirrors if data.mirror says so."""
    return num_images * (2 if params.data.mirror else 1) * 2 * prod(params.latent_shape) * 2


def plan_text(
    params: Params, names: Sequence[str], machine: Machine, num_images: int, num_classes: int
) -> Generator[Tick, None, str]:
    """Return the plan of some models, or of all, as a table and what its figures rest on."""
    unknown = [name for name in names if name not in params.models]
    if unknown:
        raise UserError(f"Found no run {unknown[0]!r} in params, expected one of {', '.join(params.models)}.")
    names = names or list(params.models)
    plans = []
    for done, name in enumerate(names):
        yield Tick(done, len(names), "runs", name)
        plans.append(plan_run(params, name, num_images, num_classes, machine))
    yield Tick(len(names), len(names), "runs")
    header = ("run", "G", "D", "TFLOP/update", "G forwards", "images", "updates", "GB/device", "days", "disk GB")
    gpu = GPUS[machine.gpu]
    rows = [_row(plan, gpu) for plan in plans]
    total = sum(plan.days for plan in plans)
    disk = sum(plan.checkpoint_bytes for plan in plans) + latents_bytes(params, num_images)
    latents = latents_bytes(params, num_images) / 1e9
    lines = [
        table_text(header, rows),
        f"In all about {_figure(total)} days and {_figure(disk / 1e9)} GB of disk, {_figure(latents)} of it latents"
        f" ({num_images:,} images{', both mirrors' if params.data.mirror else ''}, float16 moments).",
        f"On {machine.gpus} x {machine.gpu} in {machine.precision}: {gpu.peak(machine.precision) / 1e12:g} TFLOP/s each"
        f" by the data sheet (dense), of which {machine.utilisation:.0%} are assumed to be used (--utilisation).",
        *NOTES,
    ]
    crowded = [plan.name for plan in plans if plan.memory_bytes > gpu.memory * 1e9]
    if crowded:
        lines.append(
            f"! More than the {gpu.memory:g} GB of one {machine.gpu}: {', '.join(crowded)}. Take more --gpus or others."
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


@cache
def measure(run: Run, config: ModelConfig, batch_size: int) -> Work:
    """Count one update of a run on a batch of `batch_size`, without guidance; shapes alone, nothing is computed.

    Lazy penalties are counted by their mean over updates.
    """
    penalised = max(round(batch_size * run.penalty.share), 1)
    with torch.device("meta"):
        generator, discriminator = build_generator(config), build_discriminator(config)
        flow, latents = Flow(generator, config.form, config.nfe), torch.empty(batch_size, *config.latent_shape)
        times = (None, None) if config.nfe == 1 else (torch.empty(batch_size), torch.empty(batch_size))
        batch = Batch(latents, torch.empty_like(latents), torch.zeros(batch_size, dtype=torch.int64), *times)
        noise = PenaltyNoise(torch.empty_like(latents[:penalised]), torch.empty_like(latents[:penalised]))
        with _Counter() as alone:
            flow(batch.source, batch.labels, batch.s, batch.t).sum().backward()
        with _Counter() as d_step:
            discriminator_step(flow, discriminator, batch, noise, run)
        with _Counter() as d_step_without:
            discriminator_step(flow, discriminator, batch, None, run)
        discriminator.requires_grad_(False)
        with _Counter() as g_step:
            generator_step(flow, discriminator, batch, 1.0, None)
    weights = [*generator.parameters(), *discriminator.parameters()]
    activations = max(step.kept_bytes(weights) for step in (d_step, g_step))

    def mean(direction: str) -> float:  # over updates with penalties and without, both steps
        with_, without, g = (getattr(step, direction) for step in (d_step, d_step_without, g_step))
        return (with_ + (run.penalty.every - 1) * without) / run.penalty.every + g

    of_g = 2 * alone.forward_flops, alone.backward_flops
    parts = Parts(
        generator_forward=alone.forward_flops * (1 if run.reuse_forward else 2),
        generator_backward=of_g[1],
        discriminator_forward=mean("forward_flops") - of_g[0],
        discriminator_backward=mean("backward_flops") - of_g[1],
    )
    return Work(alone.forward_flops, sum(parts), activations, parts)


@cache
def guidance_flops(size: str, config: ModelConfig, batch_size: int) -> float:
    """Count what the guiding classifier adds to an update: its forward pass, and the one back to its input."""
    with torch.device("meta"):
        classifier = LatentClassifier(SIZES[size], config.channels, config.latent_size, config.num_classes)
        latents = torch.empty(batch_size, *config.latent_shape, requires_grad=True)
        with _Counter() as counter:
            logits = classifier.requires_grad_(False)(latents, torch.empty(batch_size))
            logits.sum().backward()
    return counter.forward_flops + counter.backward_flops


def kept_by(work: Callable[[], object], weights: list[torch.nn.Parameter]) -> int:
    """Return the bytes that some work keeps for its backward pass, besides `weights`."""
    with _Counter() as counter:
        work()
    return counter.kept_bytes(weights)


class _Counter(TorchDispatchMode):
    """Count the FLOPs of matrix products and convolutions, and the bytes that are kept for backward passes.

    torch's FlopCounterMode has the same formulas, but follows modules too, which fails on gradients by a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward_flops = self.backward_flops = 0.0
        self._kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no number is given twice
        self._attention: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def kept_bytes(self, weights: list[torch.nn.Parameter]) -> int:
        """Return the bytes kept besides the weights and attention maps, which fused attention does not keep."""
        others = self._attention.keys() | {weight.untyped_storage()._cdata for weight in weights}
        return sum(storage.nbytes() for number, storage in self._kept.items() if number not in others)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
                self.forward_flops += flops
            else:
                self.backward_flops += flops
        if func._overloadpacket in (torch.ops.aten._softmax, torch.ops.aten._safe_softmax):
            self._attention[result.untyped_storage()._cdata] = result.untyped_storage()
        return result

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage._cdata] = storage
        return tensor
