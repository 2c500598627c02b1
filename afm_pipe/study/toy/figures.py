"""The paper's Figures 1 to 3, drawn from our own maps as PNG; the same inputs give the same bytes."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from afm_pipe.params import Toy
from afm_pipe.study.toy import mixture
from afm_pipe.study.toy.experiment import Experiment
from afm_pipe.study.toy.results import PAPER, ToyResults

SEED_COLORS = ("#1f6fb5", "#c4511a", "#2b8a3e", "#8b46b5", "#9a7200", "#0c7f81", "#c2255c", "#555b63")
CLASS_COLORS = ("#1f6fb5", "#2b8a3e", "#9a7200", "#c2255c")
INK, MUTED, BAND = "#1c2127", "#59636e", "#e7eaee"
MAX_NOISE, MAX_DATA = 2.6, 2.15
BIN = 0.01  # width of the bins of Figure 3
DASHED, DOTTED = (0, (4, 2)), (0, (1, 2))


def draw_maps(experiment: Experiment, results: ToyResults, toy: Toy, path: Path) -> None:
    """Draw Figure 1: the learned maps of all seeds, of the GAN, flow matching and AFM by number of steps."""
    columns = 1 + len(toy.steps)
    figure = Figure(figsize=(2.9 * columns, 6.6), dpi=110, layout="constrained")
    panels = figure.subplots(2, columns)
    _draw_map(panels[0, 0], experiment, results, "gan", "GAN, 1 step")
    _draw_key(panels[1, 0], toy)
    for row, (method, title) in enumerate((("flow", "Flow matching"), ("afm", "Adversarial flow"))):
        for panel, steps in zip(panels[row, 1:], toy.steps, strict=True):
            title_of_steps = f"{title}, {steps} step{'s' * (steps > 1)}"
            _draw_map(panel, experiment, results, f"{method}_{steps}", title_of_steps)
    _save(figure, path)


def draw_sweep(experiment: Experiment, results: ToyResults, path: Path) -> None:
    """Draw Figure 2: one-step maps by transport weight, from the GAN to the identity."""
    one_step = ((each.transport, name) for name, each in experiment.maps.items() if each.steps == 1)
    sweep = sorted((weight, name) for weight, name in one_step if weight is not None)
    figure = Figure(figsize=(2.9 * len(sweep), 3.5), dpi=110, layout="constrained")
    for panel, (weight, name) in zip(figure.subplots(1, len(sweep), squeeze=False)[0], sweep, strict=True):
        panel.plot([-3, 3], [-3, 3], color=MUTED, linewidth=0.9, linestyle=DOTTED, zorder=1)
        title = f"λ_ot = {weight:g}" + " (GAN)" * (weight == 0)
        _draw_map(panel, experiment, results, name, title, measure="move")
    _save(figure, path)


def draw_guidance(experiment: Experiment, toy: Toy, path: Path) -> None:
    """Draw Figure 3: histograms of each class without guidance, with both kinds of it, and with exact CFG."""
    low, high = toy.guidance.t
    rows = {
        "none": "No guidance",
        "plain": "Plain classifier guidance\nt′ = 0",
        "flow_based": f"Flow-based guidance\nt′ ~ U({low:g}, {high:g})",
        "exact_cfg": f"Classifier-free guidance ×{toy.guidance.cfg_scale:g}\nof the exact flow",
    }
    figure = Figure(figsize=(10.6, 5.6), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True)
    edges = np.arange(-MAX_DATA, MAX_DATA + BIN, BIN)
    for panel, (name, title) in zip(panels, rows.items(), strict=True):
        for label, (color, mean) in enumerate(zip(CLASS_COLORS, mixture.MEANS, strict=True)):
            x = experiment.guided[name][:, label].flatten().numpy()
            counts, _ = np.histogram(x, bins=edges)
            heights = counts / max(counts.max(), 1)
            panel.axvspan(mean - 2 * mixture.STD, mean + 2 * mixture.STD, color=BAND, linewidth=0, zorder=0)
            panel.axvline(mean, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
            panel.stairs(heights, edges, fill=True, color=color, alpha=0.85, linewidth=0, zorder=2)
            place, axes = mean + 0.25 * np.sign(mean), panel.get_xaxis_transform()
            panel.text(place, 0.72, f"{x.mean():+.2f}", color=color, fontsize=10, ha="center", transform=axes)
        panel.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10, color=INK, labelpad=10)
        _style(panel)
        panel.set(yticks=[], xlim=(-MAX_DATA, MAX_DATA))
    panels[-1].set_xlabel("sample, colored by target class; the number is the class mean", fontsize=10, color=INK)
    panels[-1].set_xticks(mixture.MEANS)
    _save(figure, path)


def _draw_map(
    panel: Axes, experiment: Experiment, results: ToyResults, name: str, title: str, measure: str = "rms"
) -> None:
    noise = experiment.noise.numpy()
    for mean in mixture.MEANS:
        panel.axhspan(mean - 2 * mixture.STD, mean + 2 * mixture.STD, color=BAND, linewidth=0, zorder=0)
    for index, x in enumerate(experiment.maps[name].x.numpy()):
        panel.plot(noise, x, color=SEED_COLORS[index % len(SEED_COLORS)], linewidth=1.2, alpha=0.9, zorder=2)
    optimal = mixture.optimal_map(experiment.noise).numpy()
    panel.plot(noise, optimal, color="black", linewidth=1.0, linestyle=DASHED, zorder=3)
    panel.set_title(title, fontsize=11, color=INK, fontweight="bold", loc="left", pad=18)
    numbers = results.maps[name].model_dump()
    labels = {"w1": "W1", "spread": "seeds", measure: {"rms": "optimal"}.get(measure, measure)}
    words = "   ".join(f"{label} {numbers[f'{key}_mean']:.2f}" for key, label in labels.items())
    panel.text(0, 1.025, words, transform=panel.transAxes, va="bottom", fontsize=8.5, color=MUTED).set_in_layout(False)
    _style(panel)
    limits = {"xlim": (-MAX_NOISE, MAX_NOISE), "ylim": (-MAX_DATA, MAX_DATA)}
    panel.set(xticks=[-2, 0, 2], yticks=mixture.MEANS, **limits)
    panel.set_xlabel("noise", fontsize=9, color=MUTED, labelpad=1)
    panel.set_ylabel("sample", fontsize=9, color=MUTED, labelpad=-2)


def _draw_key(panel: Axes, toy: Toy) -> None:
    """Fill a panel with the key to the others."""
    panel.axis("off")
    for index, color in enumerate(SEED_COLORS[: toy.seeds]):
        panel.plot([], [], color=color, linewidth=2, label=f"seed {index}")
    panel.plot([], [], color="black", linewidth=1, linestyle=DASHED, label="optimal map (exact)")
    panel.axhspan(9, 9, color=BAND, label="data: four narrow modes")
    panel.legend(loc="upper left", frameon=False, fontsize=9, borderaxespad=0, labelspacing=0.35)
    words = (
        "W1: from the samples to the data",
        "seeds: between the maps of two seeds",
        "optimal: to the optimal map (both RMS)",
        "",
        f"Adversarial flow: λ_ot = {toy.transport:g}",
        f"Width {toy.width}, batch {toy.batch_size},",
        f"{2 * toy.pairs:,} alternating updates",
        f"(paper: {PAPER.width}, {PAPER.batch_size}, {PAPER.updates:,})",
    )
    panel.text(0.02, 0, "\n".join(words), transform=panel.transAxes, fontsize=8.5, color=MUTED, linespacing=1.35)
    panel.set_ylim(0, 1)


def _style(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(MUTED)
    panel.tick_params(colors=MUTED, labelsize=8.5, length=3)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})
