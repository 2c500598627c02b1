"""Params of the training monitor: when it measures, what counts as a failure, and how it reacts."""

from typing import Annotated, Literal

from pydantic import Field

from afm_pipe.params.base import Count, Fraction, NotNegative, NotNegativeCount, Positive, Section


class Probe(Section):
    """Periodic measurement of sample quality: EMA samples against training latents, without decoding."""

    every_epochs: Positive
    samples: Annotated[int, Field(ge=20)]
    """Number of samples, and of training latents, in equal shares of the classes; at most the size of the data set."""
    updates: Count
    """Updates that train the feature network, a classifier of latents at full resolution, at the start of a run. Guided
    runs use their guidance classifier instead."""
    batch_size: Count
    """Latents per update of the feature network."""
    width: Count
    """Channels of the first layer of the feature network; later layers have up to four times as many."""


class IdentityRule(Section):
    """G returns its noise: its transport distance, rms(G(z) - z) over the expected distance, is too small."""

    transport_rms: NotNegative
    """Threshold on the distance; with several steps, on one step's distance times the number of steps."""


class DivergenceRule(Section):
    """A loss is non-finite or too large, or samples are much larger or less diverse than data."""

    loss: Positive
    """Largest adversarial loss of D or G."""
    output_scale: Positive
    """Largest rms(G(z)) over rms(x)."""
    spread: NotNegative
    """Smallest variance of a probe's samples over that of the data."""


class StagnationRule(Section):
    """Quality stops improving while D wins: the trend over the last `probes` probes is worse than `improvement`."""

    probes: Annotated[int, Field(ge=3)]
    improvement: Fraction
    """Expected improvement from probe to probe, as a fraction of the distance; significantly less is a plateau."""
    d_accuracy: Fraction
    """D wins if its accuracy on pairs is above this."""


class CollapseRule(Section):
    """Mode collapse: samples vary too little within a class, or classes are not distinguishable."""

    variance: NotNegative
    """Smallest variance of features within classes, over that of the data."""
    class_accuracy: NotNegative
    """Smallest accuracy of the feature network on samples, over its accuracy on the data."""
    drop: Fraction
    """Fraction by which variance or accuracy falls below its mean over earlier probes: some classes collapse."""
    probes: Count
    """Number of consecutive probes below one of the thresholds that raises the alarm."""


class Reaction(Section):
    """How the policy `act` reacts to a failure."""

    rollbacks: NotNegativeCount
    """Number of times that a diverging run rolls back to its last good probe before it fails."""
    lr: Annotated[float, Field(gt=0, le=1)]
    """Factor on the learning rates at every rollback and every reload of D."""
    candidates: Count
    """Number of earlier discriminators that a reload of D tries."""
    trial_epochs: Positive
    """Epochs for which each of them is tried."""
    transport_speed: Annotated[float, Field(gt=1)]
    """Speed-up of the decay of the transport weight at each identity alarm; divides a weight that no longer decays."""


class Auto(Section):
    """`schedule: auto`: phases 2 and 3 (paper Table 11) begin, and training stops, when probes stop improving."""

    lr: Annotated[tuple[Positive, Positive], Field(strict=False)]
    """Learning rates of phases 2 and 3 over that of phase 1; 0.8 and 0.3 in the paper."""
    transport: NotNegative
    """Transport weight of phases 2 and 3; 0.001 in the paper (Table 11)."""


class Monitor(Section):
    """Rules that detect a failing run, and the reactions to it."""

    policy: Literal["off", "warn", "act"]
    """off: no probes and no rules; warn: log events; act: react to them too."""
    settle_epochs: NotNegative
    """Epochs at the start of a run in which the identity rule and the rules on probes do not fire, since every run
    starts close to a failure."""
    significance: Positive
    """Number of standard errors by which a probe's figure must be beyond a threshold."""
    rows: Count
    """Number of rows of the curves that rules average over."""
    probe: Probe
    identity: IdentityRule
    divergence: DivergenceRule
    stagnation: StagnationRule
    collapse: CollapseRule
    act: Reaction
    auto: Auto
