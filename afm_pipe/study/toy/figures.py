"""The paper's Figures 1 to 3, drawn from our own maps, as PNG; the same inputs give the same bytes."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from afm_pipe.params import Toy
from afm_pipe.study.toy import mixture
from afm_pipe.study.toy.study import PAPER, Study

SEEDS = ("#1f6fb5", "#c4511a", "#2b8a3e", "#8b46b5", "#9a7200", "#0c7f81", "#c2255c", "#555b63")
CLASSES = ("#1f6fb5", "#2b8a3e", "#9a7200", "#c2255c")
INK, MUTED, BAND = "#1c2127", "#59636e", "#e7eaee"
FARTHEST_NOISE, FARTHEST_DATA = 2.6, 2.15
BIN = 0.01  # width of Figure 3's bins


def draw_maps(study: Study, results: dict[str, Any], toy: Toy, path: Path) -> None:
    """Draw Figure 1: the learned maps of all seeds of the GAN, flow matching and AFM, each over its steps."""
    columns = 1 + len(toy.steps)
    figure = Figure(figsize=(2.9 * columns, 6.6), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, columns)
    _map_panel(figure.add_subplot(grid[0, 0]), study, results, "gan", "GAN, 1 step")
    _key(figure.add_subplot(grid[1, 0]), toy)
    for row, (method, title) in enumerate((("flow", "Flow matching"), ("afm", "Adversarial flow"))):
        for column, steps in enumerate(toy.steps, start=1):
            panel = figure.add_subplot(grid[row, column])
            name = f"{method}_{steps}"
            _map_panel(panel, study, results, name, f"{title}, {steps} step{'s' * (steps > 1)}")
    _save(figure, path)


def draw_sweep(study: Study, results: dict[str, Any], path: Path) -> None:
    """Draw Figure 2: one-step maps by transport weight, from the GAN to the identity."""
    names = sorted(
        (name for name, learned in study.maps.items() if learned.steps == 1 and learned.transport is not None),
        key=lambda name: study.maps[name].transport or 0.0,
    )
    figure = Figure(figsize=(2.9 * len(names), 3.5), dpi=110, layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        weight = study.maps[name].transport
        panel.plot([-3, 3], [-3, 3], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        _map_panel(panel, study, results, name, f"λ_ot = {weight:g}" + " (GAN)" * (weight == 0), with_move=True)
    _save(figure, path)


def draw_guidance(study: Study, toy: Toy, path: Path) -> None:
    """Draw Figure 3: where each class's samples lie without guidance, with both kinds of it, and with exact CFG."""
    low, high = toy.guidance.t
    rows = {
        "none": "No guidance",
        "plain": "Plain classifier guidance\nt′ = 0",
        "flow_based": f"Flow-based guidance\nt′ ~ U({low:g}, {high:g})",
        "exact_cfg": f"Classifier-free guidance ×{toy.guidance.cfg_scale:g}\nof the exact flow",
    }
    figure = Figure(figsize=(10.6, 5.6), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True)
    edges = np.arange(-FARTHEST_DATA, FARTHEST_DATA + BIN, BIN)
    for panel, (name, title) in zip(panels, rows.items(), strict=True):
        samples = study.guided[name]  # (S, classes, K)
        for label, colour in enumerate(CLASSES):
            mean = mixture.MEANS[label]
            panel.axvspan(mean - 2 * mixture.STD, mean + 2 * mixture.STD, color=BAND, linewidth=0, zorder=0)
            panel.axvline(mean, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
            of_class = samples[:, label].flatten().numpy()
            counts, _ = np.histogram(of_class, bins=edges)
            panel.stairs(
                counts / max(counts.max(), 1), edges, fill=True, color=colour, alpha=0.85, linewidth=0, zorder=2
            )
            panel.text(
                (mean + 0.25 * np.sign(mean)),
                0.72,
                f"{of_class.mean():+.2f}",
                color=colour,
                fontsize=10,
                ha="center",
                transform=panel.get_xaxis_transform(),
            )
        panel.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10, color=INK, labelpad=10)
        _plain(panel)
        panel.set_yticks([])
        panel.set_xlim(-FARTHEST_DATA, FARTHEST_DATA)
    panels[-1].set_xlabel("sample, coloured by the class asked for; the number is its mean", fontsize=10, color=INK)
    panels[-1].set_xticks(mixture.MEANS)
    _save(figure, path)


def _map_panel(
    panel: Axes, study: Study, results: dict[str, Any], name: str, title: str, with_move: bool = False
) -> None:
    noise, maps = study.noise.numpy(), study.maps[name].x.numpy()
    for mean in mixture.MEANS:
        panel.axhspan(mean - 2 * mixture.STD, mean + 2 * mixture.STD, color=BAND, linewidth=0, zorder=0)
    for index, x in enumerate(maps):
        panel.plot(noise, x, color=SEEDS[index % len(SEEDS)], linewidth=1.2, alpha=0.9, zorder=2)
    optimal = mixture.optimal_map(study.noise).numpy()
    panel.plot(noise, optimal, color="black", linewidth=1.0, linestyle=(0, (4, 2)), zorder=3)
    panel.set_title(title, fontsize=11, color=INK, fontweight="bold", loc="left", pad=18)
    shown = [("W1", "w1"), ("seeds", "spread"), ("move", "move") if with_move else ("optimal", "rms")]
    words = "   ".join(f"{label} {results['maps'][name][f'{key}_mean']:.2f}" for label, key in shown)
    panel.text(0, 1.025, words, transform=panel.transAxes, va="bottom", fontsize=8.5, color=MUTED).set_in_layout(False)
    _plain(panel)
    panel.set_xlim(-FARTHEST_NOISE, FARTHEST_NOISE)
    panel.set_ylim(-FARTHEST_DATA, FARTHEST_DATA)
    panel.set_xticks([-2, 0, 2])
    panel.set_yticks(mixture.MEANS)
    panel.set_xlabel("noise", fontsize=9, color=MUTED, labelpad=1)
    panel.set_ylabel("sample", fontsize=9, color=MUTED, labelpad=-2)


def _key(panel: Axes, toy: Toy) -> None:
    """Use a panel to say how to read the others."""
    panel.axis("off")
    handles: list[Artist] = [
        panel.plot([], [], color=colour, linewidth=2, label=f"seed {index}")[0]
        for index, colour in enumerate(SEEDS[: toy.seeds])
    ]
    handles += panel.plot([], [], color="black", linewidth=1, linestyle=(0, (4, 2)), label="optimal map (exact)")
    handles.append(panel.axhspan(9, 9, color=BAND, label="data: four narrow modes"))
    panel.legend(handles=handles, loc="upper left", frameon=False, fontsize=9, borderaxespad=0, labelspacing=0.35)
    words = (
        "W1: from the samples to the data",
        "seeds: between the maps of two seeds",
        "optimal: to the optimal map (both RMS)",
        "",
        f"Adversarial flow: λ_ot = {toy.transport:g}",
        f"Width {toy.width}, batch {toy.batch_size},",
        f"{2 * toy.pairs:,} alternating updates",
        f"(paper: {PAPER['width']}, {PAPER['batch_size']}, {PAPER['updates']:,})",
    )
    panel.text(0.02, 0, "\n".join(words), transform=panel.transAxes, fontsize=8.5, color=MUTED, linespacing=1.35)
    panel.set_ylim(0, 1)


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(MUTED)
    panel.tick_params(colors=MUTED, labelsize=8.5, length=3)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})
