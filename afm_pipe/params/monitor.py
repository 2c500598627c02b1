"""Params of the training monitor: when it measures, what counts as a failure, and what it does."""

from typing import Annotated, Literal

from pydantic import Field

from afm_pipe.params.base import Count, Fraction, NotNegative, NotNegativeCount, Positive, Section


class Probe(Section):
    """Periodic measurement of quality: EMA samples against training latents, without decoding."""

    every_epochs: Positive
    samples: Annotated[int, Field(ge=20)]
    """Number of samples and of training latents, in equal shares of the classes; at most the data set's size."""
    updates: Count
    """Training updates of the feature network, which classifies latents at full resolution, at the start of a run.
    Guided runs use the classifier that guides them instead."""
    batch_size: Count
    """Latents per update of the feature network."""
    width: Count
    """Channels of the feature network's first layer; later layers have up to four times as many."""


class IdentityRule(Section):
    """G returns its noise: its transport distance, rms(G(z) - z) over the expected distance, is too small."""

    transport_rms: NotNegative
    """Threshold; with several steps, of one step's distance times their number."""


class DivergenceRule(Section):
    """A loss is non-finite or too large, or samples are much larger or less diverse than data."""

    loss: Positive
    """Largest adversarial loss of D or G."""
    output_scale: Positive
    """Largest rms(G(z)) over rms(x)."""
    spread: NotNegative
    """Smallest variance of a probe's samples over that of the data."""


class StagnationRule(Section):
    """Quality stops improving while D wins: the trend of the last `probes` probes is worse than `improvement`."""

    probes: Annotated[int, Field(ge=3)]
    improvement: Fraction
    """Fraction of its distance by which a run improves from probe to probe; significantly less is a plateau."""
    d_accuracy: Fraction
    """D wins above this accuracy on pairs."""


class CollapseRule(Section):
    """Mode collapse: samples vary too little within a class, or classes are not distinguishable."""

    variance: NotNegative
    """Smallest variance of features within classes, over that of the data."""
    class_accuracy: NotNegative
    """Smallest accuracy of the probe's network on the samples' classes, over that on the data."""
    drop: Fraction
    """Fraction by which either falls below its mean over the probes before: some of the classes collapse."""
    probes: Count
    """Consecutive probes below one of the thresholds."""


class Reaction(Section):
    """What the policy `act` does about a failure."""

    rollbacks: NotNegativeCount
    """How often a diverging run returns to its last good probe before it fails."""
    lr: Annotated[float, Field(gt=0, le=1)]
    """Factor of the learning rates after every rollback and every reload of D."""
    candidates: Count
    """Earlier discriminators that a reload of D tries."""
    trial_epochs: Positive
    """Epochs that each of them is tried for."""
    transport_speed: Annotated[float, Field(gt=1)]
    """Speed-up of the transport weight's decay after each identity alarm; a weight that does not decay is divided by
    this."""


class Auto(Section):
    """`schedule: auto`: phases 2 and 3 (paper Table 11) begin, and training stops, when probes stop improving."""

    lr: Annotated[tuple[Positive, Positive], Field(strict=False)]
    """Learning rates of phases 2 and 3 over that of phase 1; in the paper 0.8 and 0.3."""
    transport: NotNegative
    """Transport weight of phases 2 and 3; 0.001 in the paper (Table 11)."""


class Monitor(Section):
    """Rules that recognize a failing run, and what to do about it."""

    policy: Literal["off", "warn", "act"]
    """off: no probes and no rules; warn: log events; act: react to them too."""
    settle_epochs: NotNegative
    """Epochs before which the identity rule and the rules on probes do not fire, since every run starts near a
    failure."""
    significance: Positive
    """Standard errors by which a probe's figure must lie beyond a limit."""
    rows: Count
    """Rows of the curves that rules average over."""
    probe: Probe
    identity: IdentityRule
    divergence: DivergenceRule
    stagnation: StagnationRule
    collapse: CollapseRule
    act: Reaction
    auto: Auto
