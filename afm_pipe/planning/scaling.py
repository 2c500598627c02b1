"""Write the tables of docs/scaling.md: every run of the ImageNet profile on 1, 8 and 64 GPUs.

python -m afm_pipe.planning.scaling
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from afm_pipe.models.model_files import ModelConfig, run_config
from afm_pipe.objectives import build_objective
from afm_pipe.params import Params, Run
from afm_pipe.params.file import load_params
from afm_pipe.planning.budget import RUNTIME, state_bytes
from afm_pipe.planning.plan import (
    GPUS,
    IMAGENET_IMAGES,
    NODE,
    UTILIZATIONS,
    Machine,
    latents_bytes,
    plan_run,
    rounded,
    row_bytes,
)
from afm_pipe.planning.storage import count_peak

CLASSES = 1000  # of ImageNet
PAGE, PROFILE = Path("docs/scaling.md"), Path("profiles/imagenet256.yaml")
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"
GPU, UTILIZATION, WORLDS = "h100", UTILIZATIONS["tf32"][1], (1, NODE, 8 * NODE)
MACHINES = [Machine(GPU, gpus, UTILIZATION, "tf32") for gpus in WORLDS]


def page_with_tables(page: str, params: Params) -> str:
    """Return a page with its tables replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables(params)}\n{END}{rest.partition(END)[2]}"


def tables(params: Params) -> str:
    """Return the tables of docs/scaling.md as Markdown."""
    # Parts of a batch on 64 GPUs are 4 images, 1 of them penalized: everything else follows from one count per run.
    plans = [plan_run(params, name, IMAGENET_IMAGES, CLASSES, MACHINES[-1]) for name in params.models]
    updates, times, total = [], [], [0.0] * len(WORLDS)
    for plan in plans:
        needs, latents = plan.budget, 2 * params.models[plan.name].batch_size * row_bytes(params)  # of D and of G
        counts = (f"{count / 1e6:.0f}M" for count in needs.parameters.values())
        work = (plan.work.units, plan.work.flops / 1e12, needs.gradient_bytes / 1e9, latents / 1e6)
        updates.append([f"`{plan.name}`", *counts, *map(rounded, work), f"{plan.updates:,}"])
        row = [f"`{plan.name}`"]
        for index, machine in enumerate(MACHINES):
            there = plan._replace(machine=machine)
            total[index] += there.days
            row += [
                f"{rounded(1e3 * there.compute_seconds)} + {rounded(1e3 * there.reduce_seconds)}",
                rounded(there.days),
            ]
        times.append([*row, rounded(latents / (plan.compute_seconds + plan.reduce_seconds) / 1e6)])
    times.append(["all", *(cell for days in total for cell in ("", rounded(days))), ""])
    gpus = ", ".join(map(str, WORLDS))
    return "\n\n".join(
        (
            "Per update, on any number of GPUs (batch 256):",
            _table(("run", "G", "D", "G forwards", "TFLOP", "GB of gradients", "MB of latents", "updates"), updates),
            f"Time on {gpus} GPUs ({GPU}, TF32 at {UTILIZATION:.0%} of the peak): milliseconds per update as compute + "
            "gradient all-reduce without overlap, and days per run; then the rate at which all GPUs together read "
            "latents.h5.",
            _table(("run", *(f"{unit}, {n}" for n in WORLDS for unit in ("ms", "days")), f"MB/s, {WORLDS[-1]}"), times),
            f"Memory: GB of state per GPU, replicated (1) and sharded over {WORLDS[1]} and {WORLDS[2]} GPUs (FSDP2); "
            "MB of activations per image, plain and with activation checkpointing; images that fit one "
            f"{GPUS[GPU].memory:g} GB card at once beside replicated state, plain / checkpointed, and beside state "
            f"sharded over {NODE} GPUs, checkpointed.",
            _table(
                ("run", *(f"GB, {n}" for n in WORLDS), "MB", "MB checkpointed", "images", f"images, {NODE} shards"),
                [_memory_row(params, name) for name in params.runs],
            ),
            f"latents.h5 takes {latents_bytes(params, IMAGENET_IMAGES) / 1e9:.1f} GB.",
        )
    )


def _memory_row(params: Params, name: str) -> list[str]:
    run = params.runs[name]
    config = run_config(run, params.latent_shape, CLASSES)
    kept, spare = (_activations(run, config, checkpoint) for checkpoint in (False, True))
    objective = build_objective(run, config)
    with torch.device("meta"):
        networks = objective.build_networks()
    state = [state_bytes(networks, objective.sampled, n) for n in WORLDS]

    def fit(state_bytes: int, activations: tuple[float, float]) -> int:
        fixed, each = activations
        return max(int((1e9 * GPUS[GPU].memory - RUNTIME - state_bytes - fixed) // each), 0)

    return [
        f"`{name}`",
        *(rounded(each / 1e9) for each in state),
        rounded(kept[1] / 1e6),
        rounded(spare[1] / 1e6),
        f"{fit(state[0], kept)} / {fit(state[0], spare)}",
        f"{fit(state[1], spare)}",
    ]


def _activations(run: Run, config: ModelConfig, checkpoint: bool) -> tuple[float, float]:
    """Return the bytes of activations of many images as a number for none and one for each."""
    images = 64
    once, twice = (
        count_peak(run, config, count, round(count * run.penalty.batch_fraction), 1, checkpoint).activation_bytes
        for count in (images, 2 * images)
    )
    return 2 * once - twice, (twice - once) / images


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(), load_params(PROFILE)))
