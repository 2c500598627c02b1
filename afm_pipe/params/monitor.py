"""Params of the watch: when a training is looked at, what counts as a failure, and what is done about it."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from afm_pipe.params.base import Count, Fraction, NotNegative, Positive, Section


class Probe(Section):
    """The periodic measure of quality: samples of G's moving average against training latents, without decoding."""

    every_epochs: Positive
    samples: Annotated[int, Field(ge=20)]
    """Samples, and as many training latents, in equal shares of the classes; at most the size of the data set."""
    updates: Count
    """Of the feature network, which classifies latents at full resolution: trained when a run starts. Guided runs use
    the classifier that guides them instead."""
    batch_size: Count
    """Latents per update of the feature network."""
    width: Count
    """Channels of the feature network's first layer; later layers have up to four times as many."""


class IdentityRule(Section):
    """G returns its noise: the transport distance rms(G(z) - z) is below `transport_rms`."""

    transport_rms: NotNegative
    """Over several steps, the distance of one times their number."""


class DivergenceRule(Section):
    """A loss is not finite or above `loss`, or samples are much larger or much more alike than data."""

    loss: Positive
    """Of D's or G's adversarial loss."""
    output_scale: Positive
    """rms(G(z)) over rms(x)."""
    spread: NotNegative
    """Variance of the samples at a probe over the data's, below which they have collapsed onto a point."""


class StagnationRule(Section):
    """Quality stops improving while D wins: the trend of the last `probes` probes is worse than `improvement`."""

    probes: Annotated[int, Field(ge=3)]
    improvement: Fraction
    """Share of its distance by which a run improves from probe to probe; significantly less counts as a plateau."""
    d_accuracy: Fraction
    """D wins above this accuracy."""


class CollapseRule(Section):
    """Mode collapse: samples of a class vary too little, or do not differ from those of other classes."""

    variance: NotNegative
    """Of the probe's features within classes, over the data's."""
    class_accuracy: NotNegative
    """Of the samples in the feature network's eyes, over the data's."""
    drop: Fraction
    """Share by which either falls below its mean over the probes before: a collapse of some of the classes."""
    probes: Count
    """One of these has to hold at this many probes in a row."""


class Reaction(Section):
    """What is done about a failure where the policy is to act."""

    rollbacks: Annotated[int, Field(ge=0)]
    """At most so many times a diverging training goes back to its last good probe; then it fails."""
    lr: Annotated[float, Field(gt=0, le=1)]
    """Learning rates are multiplied by this with every rollback and every reload of D."""
    candidates: Count
    """Earlier discriminators that are tried when D is put back."""
    trial_epochs: Positive
    """How long each is tried."""
    transport_speed: Annotated[float, Field(gt=1)]
    """How much faster the transport weight decays after each identity alarm; where nothing is left to decay, it is
    divided by this."""


class Auto(Section):
    """`schedule: auto`: phases 2 and 3 (paper Table 11) begin, and training stops, when the probe stops improving."""

    lr: Annotated[tuple[Positive, Positive], Field(strict=False)]
    """Learning rates of phases 2 and 3, over that of phase 1; in the paper 0.8 and 0.3."""
    transport: NotNegative
    """Transport weight of phases 2 and 3; 0.001 in the paper (Table 11)."""


class Monitor(Section):
    """Rules that recognise a failing training, and the policy towards it."""

    policy: Literal["off", "warn", "act"]
    """off: no probes, no rules; warn: events are written down; act: and something is done."""
    settle_epochs: NotNegative
    """The identity rule and rules on the probe do not fire before: every run begins near a failure."""
    significance: Positive
    """Standard errors by which a probe's figure must lie beyond a limit: rules ask for more than noise."""
    rows: Count
    """Rows of the curves over whose mean rules are asked."""
    probe: Probe
    identity: IdentityRule
    divergence: DivergenceRule
    stagnation: StagnationRule
    collapse: CollapseRule
    act: Reaction
    auto: Auto

    # YAML's `off` is a word to DVC and false to PyYAML.
    _off = field_validator("policy", mode="before")(lambda value: "off" if value is False else value)
