"""Time training, encoding and sampling on one GPU, into benchmarks/gpu/NAME.md.

make bench-gpu
python -m benchmarks.gpu b2 xl2     # some sizes
"""

import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afm_pipe.models.model_files import run_config
from afm_pipe.params import Run
from afm_pipe.planning.budget import budget, largest_part
from afm_pipe.planning.counting import measure
from afm_pipe.training.engine import Engine
from afm_pipe.training.trainer import Trainer
from benchmarks.gpu import rates
from benchmarks.gpu.inputs import CARD, CLASSES, SHAPE, card_name, run_of, trainer_of, write_page

SIZES = ("t4", "b2", "m2", "l2", "xl2", "xl2-56l", "xl2-112l")
HEADER = ("run", "updates/s", "images/s", "TFLOP/s", "of its parts", "GB")
SHOWN = 15  # operators in the table of where the time goes


def trainings(sizes: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each size, precision, and mode that fits, with the largest batch that does."""
    for size in sizes:
        name, _, deep = size.partition("-")
        for precision in ("tf32", "bf16"):
            for mode in ("eager", "compiled", "captured", "micro-batches", "checkpointed"):
                changes = {"precision": "bf16", "qk_norm": True} if precision == "bf16" else {}
                repeats = {"56l": 2, "112l": 4}.get(deep, 1)
                run, micro = _that_fits(run_of(name, repeats=repeats, **changes), mode)
                if run is None:
                    yield f"{size} {precision} {mode}", *["does not fit"] * (len(HEADER) - 1)
                    continue
                engine = Engine(mode == "checkpointed", mode == "compiled", capture=mode == "captured")
                yield f"{size} {precision} {mode}, {run.batch_size} images", *_timed(run, engine, micro)


def _that_fits(run: Run, mode: str) -> tuple[Run | None, int | None]:
    """Return a run with the largest batch that fits, if any, and its micro-batch."""
    for images in (64, 32, 16, 8, 4):
        tried, micro = run.model_copy(update={"batch_size": images}), images // 2 if mode == "micro-batches" else None
        needs = budget(tried, run_config(tried, SHAPE, CLASSES), 1, micro, mode == "checkpointed")
        if needs.memory_bytes < torch.cuda.mem_get_info()[0]:
            return tried, micro
    return None, None


def _timed(run: Run, engine: Engine, micro: int | None) -> tuple[str, ...]:
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), run, engine, micro_batch=micro)
        seconds = rates.seconds_of(partial(_update, trainer))
    config = run_config(run, SHAPE, CLASSES)
    work, parameters = measure(run, config, *largest_part(run, 1)), sum(budget(run, config).parameters.values())
    bound = rates.bound_seconds(work, run.size, run.batch_size, run.precision == "bf16", parameters)
    peak = torch.cuda.max_memory_reserved()
    del trainer
    gc.collect()  # a trainer refers to itself, and so would keep its memory
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    figures = (1 / seconds, run.batch_size / seconds, work.flops / seconds / 1e12)
    return *(f"{each:.3g}" for each in figures), f"{bound / seconds:.0%}", f"{peak / 1e9:.1f}"


def _update(trainer: Trainer) -> None:
    trainer.update(trainer.draw())


def where_the_time_goes() -> Iterator[tuple[str, ...]]:
    """Yield the slowest kernels of an update of XL/2 in TF32."""
    from torch.profiler import ProfilerActivity, profile

    run, _ = _that_fits(run_of("xl2"), "eager")
    if run is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), run)
        for _ in range(3):
            _update(trainer)
        rates.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            _update(trainer)
            rates.wait()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in events)
    for event in events[:SHOWN]:
        own = event.self_device_time_total
        yield event.key[:80].replace("|", "/"), f"{own / 1000:.1f}", f"{own / whole:.1%}", f"{event.count}"


def pictures() -> Iterator[tuple[str, ...]]:
    """Yield rates of encoding and sampling with weights of SD-VAE's shape."""
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError:
        yield "encoding and sampling", "skipped: needs diffusers"
        return
    kinds: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    vae = AutoencoderKL(**kinds, block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4)
    vae = vae.to(CARD).eval()
    images, latents = torch.rand(32, 3, 256, 256, device=CARD), torch.randn(32, *SHAPE, device=CARD)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(Path(folder), run_of("xl2", batch_size=4))
    sampler, labels = trainer.objective.sampler(trainer.state.ema), torch.zeros(32, dtype=torch.int64, device=CARD)

    def encode() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            vae.encode(images)

    works = {
        "encoding in bf16": encode,
        "generating with XL/2 in float32": lambda: sampler.sample(latents, labels),
        "decoding in float32": lambda: vae.decode(latents),
    }
    for name, work in works.items():
        with torch.no_grad():
            yield name, f"{len(images) / rates.seconds_of(work, 3):.0f} images/s"


def main(arguments: list[str]) -> int:
    """Time what is asked for; return the exit code."""
    if CARD.type != "cuda":
        print("make bench-gpu: skipped, needs a CUDA device, found none")
        return 0
    unknown = sorted(set(arguments) - set(SIZES))
    if unknown:
        print(f"Found size {unknown[0]}, expected some of {', '.join(SIZES)}.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    own = [
        ("matrix products, TF32", f"{rates.matmul_rate(False) / 1e12:.0f} TFLOP/s"),
        ("matrix products, bf16", f"{rates.matmul_rate(True) / 1e12:.0f} TFLOP/s"),
        ("attention, float32", f"{rates.attention_rate(False) / 1e12:.0f} TFLOP/s"),
        ("attention, bf16", f"{rates.attention_rate(True) / 1e12:.0f} TFLOP/s"),
        ("copies", f"{rates.copy_rate() / 1e12:.2f} TB/s"),
    ]
    tables = {
        "This card's own rates": (("what", "rate"), own),
        "Training": (HEADER, list(trainings(tuple(arguments) or SIZES))),
        "Where an update of XL/2 goes": (("kernel", "ms", "share", "calls"), list(where_the_time_goes())),
        "Encoding and sampling": (("what", "rate"), list(pictures())),
    }
    for title, (header, rows) in tables.items():
        print(json.dumps({title: rows}, indent=1))
        page = write_page(title, header, rows)
    print(f"{card_name()}: written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
