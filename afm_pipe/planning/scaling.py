"""Time and memory of every run of a study on 1, 8 and 64 GPUs, from the formulas that docs/scaling.md derives.

    python -m afm_pipe.planning.scaling        # writes the tables of docs/scaling.md anew

`afm-pipe plan` counts the work of one machine's plan on the steps themselves; here it is derived, so that it can be
read, and checked against those counts.

Legend: N images of a batch, T tokens, W width, L blocks of a network, r passes over the blocks, n GPUs.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from afm_pipe.models.dit import FREQUENCIES
from afm_pipe.models.model_files import ModelConfig, build_discriminator, build_generator, run_config
from afm_pipe.objectives.schedules import update_at
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES, ModelSize
from afm_pipe.planning.budget import D_COPIES, G_COPIES, RUNTIME
from afm_pipe.planning.counting import FLOAT, block_bytes, checkpointed_bytes
from afm_pipe.planning.plan import DAY, GPUS, latents_bytes

IMAGES, CLASSES = 1_281_167, 1000  # of ImageNet
PAGE, PROFILE = Path("docs/scaling.md"), Path("profiles/imagenet256.yaml")
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"
WORLDS = (1, 8, 64)

# Assumptions, all of them; docs/scaling.md says why.
GPU, UTILISATION = "h100", 0.4  # of the TF32 peak
NODE = 8  # GPUs of a machine
WITHIN, ACROSS = 360e9, 320e9  # bytes/s of an all-reduce within a machine, and out of one (a 400 Gb/s card per GPU)


class Needs(NamedTuple):
    """What one update of a run needs, of the global batch where it says nothing else."""

    generator: int  # parameters
    discriminator: int
    flops: float
    units: float  # in forward passes of G
    activations: float  # bytes of one image, kept for the backward passes of the larger step
    checkpointed: float  # the same with a checkpoint at every block
    latents: int  # bytes read

    @property
    def gradients(self) -> int:
        """Bytes that are summed over the ranks."""
        return FLOAT * (self.generator + self.discriminator)

    def state(self, shards: int = 1) -> float:
        """Return the bytes of weights, gradients, optimizers and moving average on one of so many GPUs."""
        return FLOAT * (G_COPIES * self.generator + D_COPIES * self.discriminator) / shards

    def compute_seconds(self, gpus: int) -> float:
        """Return the seconds of an update's matrix products."""
        return self.flops / (gpus * UTILISATION * GPUS[GPU].peak("tf32"))

    def reduce_seconds(self, gpus: int) -> float:
        """Return the seconds of summing the gradients of an update by a ring, if nothing hides them."""
        return 2 * (gpus - 1) / gpus * self.gradients / (WITHIN if gpus <= NODE else ACROSS)

    def update_seconds(self, gpus: int) -> float:
        """Return the seconds of an update, sums of gradients in full."""
        return self.compute_seconds(gpus) + self.reduce_seconds(gpus)

    def fitting(self, kept: float, shards: int = 1) -> int:
        """Return how many images fit on one GPU at a time, of which each keeps so many bytes."""
        return max(int((1e9 * GPUS[GPU].memory - RUNTIME - self.state(shards)) // kept), 0)


def block_flops(size: ModelSize, tokens: int) -> float:
    """Return the FLOPs of one block for one image: qkv, projection and MLP; modulation; attention."""
    w = size.width
    return 2 * 12 * tokens * w**2 + 2 * 6 * w**2 + attention_flops(size, tokens)


def attention_flops(size: ModelSize, tokens: int) -> float:
    """Return the FLOPs of a block's scores and of mixing by them, for one image."""
    return 2 * 2 * tokens**2 * size.width


def forward_flops(
    size: ModelSize, tokens: int, channels: int, embedders: float, outputs: int, passes: int = 1
) -> float:
    """Return the FLOPs of a forward pass for one image: blocks, patches in, time embedders, the last layer."""
    patches = 2 * tokens * channels * size.patch**2 * size.width
    times = embedders * 2 * (FREQUENCIES * size.width + size.width**2)
    return passes * size.depth * block_flops(size, tokens) + patches + times + 2 * outputs * size.width


def needs(params: Params, name: str) -> Needs:
    """Derive what a run's updates need; a guided run's in its own phase."""
    run, size = params.models[name], SIZES[params.models[name].size]
    config = run_config(run, params.latent_shape, CLASSES)
    g, d = _parameters(config)
    channels, side, _ = params.latent_shape
    tokens = (side // size.patch) ** 2
    told = {1: 0, "any": 2}.get(run.nfe, 1)
    out = tokens * channels * size.patch**2 + 2 * size.width  # last layer and its modulation
    one_g = forward_flops(size, tokens, channels, told + (run.repeats if run.repeats > 1 else 0), out, run.repeats)
    one_d = forward_flops(size, tokens + 1, channels, min(told, 1), 1)
    shown = 2 + 2 * run.penalty.batch_fraction / run.penalty.every  # batches that D sees in its own step
    # D step: G forward; D forward and twice back. G step: G forward, twice back; D on real and fake, once back.
    # Back to the input alone is one pass, but for attention, whose factors are all activations.
    flops = run.batch_size * (4 * one_g + (3 * shown + 3) * one_d + size.depth * attention_flops(size, tokens + 1))
    if run.phases[-1].guidance is not None and params.classifier is not None:
        guide = SIZES[params.classifier.size]
        guide_tokens = (side // guide.patch) ** 2 + 1
        one_c = forward_flops(guide, guide_tokens, channels, 1, CLASSES)
        flops += run.batch_size * (2 * one_c + guide.depth * attention_flops(guide, guide_tokens))

    largest = 2 + 2 * run.penalty.batch_fraction
    g_block, d_block = block_bytes(size, tokens), block_bytes(size, tokens + 1)
    passes, judged = config.repeats * size.depth, size.depth * block_bytes(size, tokens + 1, frozen=True)
    return Needs(
        generator=g,
        discriminator=d,
        flops=flops,
        units=flops / (run.batch_size * one_g),
        activations=max(largest * size.depth * d_block, passes * g_block + judged),
        checkpointed=checkpointed_bytes(config, largest, 1),
        latents=2 * run.batch_size * 2 * prod(params.latent_spec.encoded_shape),  # of D and of G; float16
    )


def updates_of(params: Params, name: str) -> int:
    """Return the updates of a run on ImageNet; of a guided run those of its own phase."""
    run = params.models[name]
    total = update_at(run, run.phases[-1].until_epoch, IMAGES)
    return total - update_at(run, run.phases[-2].until_epoch, IMAGES) if name in params.guided else total


def tables(params: Params) -> str:
    """Return the tables of docs/scaling.md as markdown."""
    found = {name: needs(params, name) for name in params.models}
    counted, timed, kept, days = [], [], [], dict.fromkeys(WORLDS, 0.0)
    for name, each in found.items():
        updates = updates_of(params, name)
        counted.append(
            [f"`{name}`", f"{each.generator / 1e6:.0f}M", f"{each.discriminator / 1e6:.0f}M", _figure(each.units)]
            + [_figure(each.flops / 1e12), _figure(each.gradients / 1e9), _figure(each.latents / 1e6), f"{updates:,}"]
        )
        row = [f"`{name}`"]
        for gpus in WORLDS:
            own = each.update_seconds(gpus) * updates / DAY
            days[gpus] += own
            row += [f"{_figure(1e3 * each.compute_seconds(gpus))} + {_figure(1e3 * each.reduce_seconds(gpus))}"]
            row += [_figure(own)]
        timed.append([*row, _figure(each.latents / each.update_seconds(WORLDS[-1]) / 1e6)])
        if name in params.guided:
            continue  # as of the run it continues, and the classifier's
        row = [f"`{name}`", *(_figure(each.state(shards) / 1e9) for shards in WORLDS)]
        row += [_figure(each.activations / 1e6), _figure(each.checkpointed / 1e6)]
        row += [f"{each.fitting(each.activations)} / {each.fitting(each.checkpointed)}"]
        kept.append([*row, f"{each.fitting(each.checkpointed, NODE)}"])
    timed.append(["all", *(cell for gpus in WORLDS for cell in ("", _figure(days[gpus]))), ""])
    parts = [
        "Counted of one update, whatever it runs on (batch 256):",
        _table(
            ("run", "G", "D", "G forwards", "TFLOP", "GB summed", "MB of latents", "updates"),
            counted,
        ),
        f"Time on {', '.join(map(str, WORLDS))} GPUs ({GPU}, TF32 at {UTILISATION:.0%} of the peak): milliseconds of "
        "an update, computing + summing gradients if nothing of it were hidden, and days of the run; then what all "
        "GPUs together read of latents.h5.",
        _table(
            ("run", *(title for n in WORLDS for title in (f"ms, {n}", f"days, {n}")), f"MB/s, {WORLDS[-1]}"),
            timed,
        ),
        f"Memory: GB of state on a GPU, whole (data parallel) and sharded over {WORLDS[1]} and {WORLDS[2]} (FSDP2); MB "
        f"that an image keeps for the backward passes, plain and with a checkpoint at every block; images that one "
        f"{GPUS[GPU].memory:g} GB card holds at a time beside whole state, plain / checkpointed, and beside state "
        f"sharded over {NODE}, checkpointed.",
        _table(
            ("run", *(f"GB, {n}" for n in WORLDS), "MB plain", "MB checkpointed", "images", f"images, {NODE} shards"),
            kept,
        ),
        f"latents.h5 is {latents_bytes(params, IMAGES) / 1e9:.1f} GB.",
    ]
    return "\n\n".join(parts)


def written(page: str, params: Params) -> str:
    """Return a page with its tables made anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables(params)}\n{END}{rest.partition(END)[2]}"


@cache
def _parameters(config: ModelConfig) -> tuple[int, int]:
    with torch.device("meta"):
        networks = build_generator(config), build_discriminator(config)
    g, d = (sum(weights.numel() for weights in network.parameters()) for network in networks)
    return g, d


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), load_params(PROFILE)))
