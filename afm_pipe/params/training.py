"""Params of the method: losses, schedules, phases, runs, guidance, the classifier that guides."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from afm_pipe.params.base import Count, Epochs, Fraction, NotNegative, NotNegativeCount, Positive, Section, Seed
from afm_pipe.params.monitor import Monitor
from afm_pipe.params.objectives import OBJECTIVES
from afm_pipe.params.sizes import SIZES

BF16_EPSILON = 0.05
"""Smallest step of the penalties' finite difference in bf16. Measured on discriminators of the default: at 0.01
rounding makes R1 46 to 77 % larger, at 0.05 up to 4 %; the step itself makes it 3 to 5 % larger than 0.01 does in
fp32."""


class Transport(Section):
    """Weight of the optimal transport loss (lambda_ot): a cosine from start to end, then end. A number: constant."""

    start: NotNegative
    end: NotNegative
    decay_epochs: Epochs
    """Epochs the cosine takes, counted from the start of the run."""


class Penalty(Section):
    """Finite-difference gradient penalties R1 and R2 (paper section 3)."""

    weight: NotNegative
    """lambda_gp, of each."""
    batch_fraction: Annotated[float, Field(gt=0, le=1)]
    """Share of the batch they are computed on."""
    epsilon: Positive
    """Step of the finite difference."""


class LazyPenalty(Penalty):
    """The penalties of a run, which may be left out of some updates."""

    every: Count
    """Computed in one D update of so many, and weighed as many times then; 1 in the paper."""


class GradientNormalization(Section):
    """Normalisation of the adversarial gradient at G's output."""

    enabled: bool
    decay: Fraction
    """Of the running mean of squared norms; Adam's second beta in the paper."""


class Ema(Section):
    """Moving average of G's weights."""

    decay: Fraction
    warmup: bool
    """Use min(decay, (1 + i) / (10 + i)) at update i."""


class Guidance(Section):
    """Flow-based classifier guidance (paper section 3): a classifier's cross entropy on G's output joins G's loss."""

    scale: NotNegative
    """lambda_cg."""
    t: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    """One step: the time t' the output is brought to before the classifier sees it is drawn from this range."""
    at: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)] | None = None
    """Several steps: guide where the target time is one of these, and let the classifier see the output as it is."""

    @model_validator(mode="after")
    def _one_of(self) -> "Guidance":
        if (self.t is None) == (self.at is None):
            raise ValueError("expected either `t`, a range (one step), or `at`, target times (several steps)")
        if self.t is not None and self.t[0] > self.t[1]:
            raise ValueError(f"expected t to be a range from low to high, found {list(self.t)}")
        return self


class Augmentation(Section):
    """Discriminator augmentation in latent space, the same draw for a real and a generated latent (paper section 3)."""

    probability: Fraction
    """Of the translation, and of each erasing."""
    translate: Fraction
    """Largest translation, as a share of the side; whole latent pixels, zeros move in."""
    erasings: NotNegativeCount
    """How many times a rectangle may be set to zero."""
    area: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    """Smallest and largest share of the latent that one erasing covers."""


class Phase(Section):
    """A stretch of training; lr and transport left out are the run's (paper Table 11)."""

    until_epoch: Epochs
    """An epoch is as many images, seen by G, as the data set holds."""
    lr: Positive | None = None
    lr_discriminator: Positive | None = None
    """D's, where it is not G's."""
    transport: Transport | None = None
    gradient_clip: Positive | None = None
    """Largest norm of G's and of D's gradient; longer ones are scaled down to it."""
    reload_ema: Literal["never", "epoch"] = "never"
    """epoch: G is replaced by its moving average at the start of the phase and after every epoch."""
    reload_discriminator: Epochs | Literal["stall"] | None = None
    """At the start of the phase D is put back to what it was at this epoch; stall: whenever the watch's stagnation rule
    fires in this phase, to the earlier D that proves best in a trial."""
    guidance: Guidance | None = None
    augment: Augmentation | None = None

    _number = field_validator("transport", mode="before")(lambda value: _constant_transport(value))


class Run(Section):
    """One training, complete: the `train` section with a run's own fields laid over it."""

    seed: Seed
    objective: Literal[tuple(OBJECTIVES)]  # type: ignore[valid-type]  # pydantic reads the names from the table
    """What is optimized."""
    size: Literal[tuple(SIZES)]  # type: ignore[valid-type]  # pydantic reads the names from the table
    nfe: Annotated[int, Field(ge=1, le=1024)] | Literal["any"]
    """Steps from noise to data that G is trained for; any: every pair of times."""
    form: Literal["direct", "residual"]
    """direct: G(x_s) = g(x_s); residual: G(x_s) = x_s - (s - t) g(x_s) (paper section 3)."""
    repeats: Literal[1, 2, 4]
    """How often G runs its blocks: XL/2 with 2 has 56 layers, with 4 it has 112. D runs its own once."""
    qk_norm: bool
    """RMS-normalise queries and keys in G and D; bf16 training needs it to be stable."""
    precision: Literal["fp32", "bf16"]
    """Of the matrix products within blocks; weights, what lies between blocks, logits and losses are float32 anyway.
    bf16 wants qk_norm to be stable, and penalty.epsilon of 0.05 or more."""
    condition_on_source: bool
    """D is also shown G's input, as further channels. The paper does without: training oscillates or diverges."""
    reuse_forward: bool
    """D and G learn from the same batch and one forward pass of G; the paper draws a batch for each."""
    label_noise: Fraction
    """Share of the labels that are replaced by random ones, drawn anew with every batch; none in the paper. Where all
    are, classes cannot be learnt: a failure the watch should notice."""
    batch_size: Count
    """Images per update over all devices; G and D each draw as many."""
    lr: Positive
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    eps: Positive
    """AdamW's."""
    weight_decay: NotNegative
    ema: Ema
    penalty: LazyPenalty
    logit_centering: NotNegative
    """lambda_cp, weight of the logit logit_centering."""
    transport: Transport
    gradient_normalization: GradientNormalization
    schedule: Literal["fixed", "auto"]
    """fixed: the phases as they are; auto: one phase, whose until_epoch is an upper bound, and the watch decides when
    the paper's phases 2 and 3 begin and when to stop."""
    phases: Annotated[tuple[Phase, ...], Field(strict=False, min_length=1)]
    monitor: Monitor

    _number = field_validator("transport", mode="before")(lambda value: _constant_transport(value))

    @property
    def guided(self) -> bool:
        """Whether a classifier is needed in any phase."""
        return any(phase.guidance is not None for phase in self.phases)

    @model_validator(mode="after")
    def _check(self) -> "Run":
        ends = [phase.until_epoch for phase in self.phases]
        if any(later <= earlier for earlier, later in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"expected until_epoch to rise from phase to phase, found {ends}")
        for start, phase in zip((0.0, *ends), self.phases, strict=False):
            if isinstance(phase.reload_discriminator, float | int) and phase.reload_discriminator > start:
                raise ValueError(
                    f"expected reload_discriminator to name an epoch before the phase starts at {start:g}, "
                    f"found {phase.reload_discriminator:g}"
                )
        waits = any(phase.reload_discriminator == "stall" for phase in self.phases)
        if waits and self.monitor.policy == "off":
            raise ValueError("expected watch.policy warn or act, since a phase reloads D on a stall; found off")
        if self.schedule == "auto" and len(self.phases) > 1:
            raise ValueError(
                f"expected one phase for schedule auto, whose until_epoch is the upper bound; found {len(self.phases)}"
            )
        if self.precision == "bf16" and self.penalty.epsilon < BF16_EPSILON:
            raise ValueError(
                f"expected penalty.epsilon to be at least {BF16_EPSILON} with precision bf16, whose rounding is as "
                f"large as what smaller steps change, found {self.penalty.epsilon}"
            )
        if round(self.batch_size * self.penalty.batch_fraction) < 1:
            raise ValueError(
                f"expected penalty.batch_fraction to leave at least one of {self.batch_size} images, "
                f"found {self.penalty.batch_fraction}"
            )
        return self


class Guided(Phase):
    """A run that continues a trained one with one more phase, usually guided (the paper's phase 4).

    G starts as the base's moving average, D as the base's last; time goes on from the base's end.
    """

    base: Annotated[str, Field(alias="from")]
    """The run it continues."""
    seed: Seed | None = None
    """Left out: the base's."""


class Affine(Section):
    """Random affine augmentation of what a classifier is trained on."""

    probability: Fraction
    degrees: NotNegative
    """Largest rotation to either side."""
    translate: Fraction
    """Largest translation, as a share of the side."""
    scale: Annotated[tuple[Positive, Positive], Field(strict=False)]
    """Smallest and largest magnification."""


class Classifier(Section):
    """The time-conditioned classifier C(x_t, t) on latents that guides (paper section 3)."""

    size: Literal[tuple(SIZES)]  # type: ignore[valid-type]  # as in Run
    batch_size: Count
    lr: Positive
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    weight_decay: NotNegative
    ema: Ema
    epochs: Epochs
    affine: Affine | None
    """Applied to latents, with reflection at the border; the paper applies it to images before encoding."""


def _constant_transport(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"start": float(value), "end": float(value), "decay_epochs": 1.0}
    return value
