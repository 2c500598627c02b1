"""Params of training: losses, schedules, phases, runs, guidance and its classifier."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from afm_pipe.params.base import (
    Count,
    Epochs,
    Fraction,
    NotNegative,
    NotNegativeCount,
    Positive,
    Section,
    Seed,
    deep_merge,
)
from afm_pipe.params.flow import FlowSettings
from afm_pipe.params.monitor import Monitor
from afm_pipe.params.objectives import OBJECTIVES, VELOCITIES
from afm_pipe.params.sizes import SIZES

BF16_EPSILON = 0.05
"""Smallest finite-difference step of the penalties in bf16. On discriminators of the default profile, rounding makes R1
46 to 77 % larger with a step of 0.01 and up to 4 % with 0.05; in fp32, 0.05 makes R1 3 to 5 % larger than 0.01."""


class Transport(Section):
    """Weight of the optimal transport loss (lambda_ot): a cosine from start to end, or a constant."""

    start: NotNegative
    end: NotNegative
    decay_epochs: Epochs
    """Length of the cosine, from the start of the run."""


class Penalty(Section):
    """Finite-difference gradient penalties R1 and R2 (paper section 3)."""

    weight: NotNegative
    """lambda_gp, the weight of R1 and of R2."""
    batch_fraction: Annotated[float, Field(gt=0, le=1)]
    """Fraction of the batch on which they are computed."""
    epsilon: Positive
    """Finite-difference step."""


class LazyPenalty(Penalty):
    """Gradient penalties, optionally lazy."""

    every: Count
    """Compute them every N updates, with N times the weight; 1 in the paper."""
    precision: Literal["fp32", "bf16"]
    """Precision of D's forward pass for the penalties in a bf16 run. fp32: a separate pass over the penalized real and
    generated images, each before and after its finite-difference step, so that epsilon can stay 0.01; bf16: part of D's
    only pass, which needs a larger epsilon."""


class GradientNormalization(Section):
    """Normalization of the adversarial gradient at the output of G."""

    enabled: bool
    decay: Fraction
    """Decay of the running mean of squared norms; Adam's beta2 in the paper."""


class Ema(Section):
    """Exponential moving average of G's weights."""

    decay: Fraction
    warmup: bool
    """Use min(decay, (1 + i) / (10 + i)) at update i."""


class Guidance(Section):
    """Flow-based classifier guidance (paper section 3): a classifier's cross-entropy on G's output joins G's loss."""

    scale: NotNegative
    """lambda_cg."""
    t: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    """One step: range of t', the time to which the output is noised before the classifier sees it."""
    at: Annotated[tuple[Fraction, ...], Field(strict=False, min_length=1)] | None = None
    """Several steps: target times at which to guide; the classifier sees the output unchanged."""

    @model_validator(mode="after")
    def _one_of(self) -> "Guidance":
        if (self.t is None) == (self.at is None):
            raise ValueError("expected either `t`, a range (one step), or `at`, target times (several steps)")
        if self.t is not None and self.t[0] > self.t[1]:
            raise ValueError(f"expected t to be a range from low to high, found {list(self.t)}")
        return self


class Augmentation(Section):
    """Augmentation of D's inputs in latent space, the same for real and generated latents (paper section 3)."""

    probability: Fraction
    """Probability of the translation, and of each erased rectangle."""
    translate: Fraction
    """Largest translation to the right and down, as a fraction of the side; in whole latent pixels, zero-padded."""
    erasings: NotNegativeCount
    """Number of rectangles that may be erased (set to zero)."""
    area: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    """Smallest and largest area of a rectangle, as a fraction of the latent."""


class Selection(Section):
    """Selection of the best EMA weights by distance; the paper reports the epoch with the best FID."""

    every_epochs: Positive
    samples: Annotated[int, Field(ge=100)]
    """Samples per measurement, from noise separate from the evaluation's, in the first of evaluate.features."""


class Phase(Section):
    """A part of a run's schedule (paper Table 11)."""

    until_epoch: Epochs
    """End of the phase. In one epoch G sees as many images as the data set has."""
    lr: Positive | None = None
    """Default: the run's."""
    lr_discriminator: Positive | None = None
    """Learning rate of D. Default: that of G."""
    transport: Transport | None = None
    """Default: the run's."""
    gradient_clip: Positive | None = None
    """Largest gradient norm, of G and of D separately."""
    reload_ema: Literal["never", "epoch"] = "never"
    """epoch: replace the weights of G by their EMA at the start of the phase and after every epoch."""
    reload_discriminator: Epochs | Literal["stall"] | None = None
    """Epoch: at the start of the phase, replace D by its weights at this epoch (in a guided run, one of the base run's
    keep_discriminators). stall: whenever the stagnation rule of the monitor fires in this phase, replace D by the
    earlier D that does best in a short trial."""
    guidance: Guidance | None = None
    augment: Augmentation | None = None

    _number = field_validator("transport", mode="before")(lambda value: _constant_transport(value))


class Run(Section):
    """All settings of a run: the `train` section overridden by the run's own fields."""

    seed: Seed
    objective: Literal[tuple(OBJECTIVES)]  # type: ignore[valid-type]  # pydantic reads the names from the table
    """The method: losses, networks and updates."""
    flow: FlowSettings | None = Field(None, exclude_if=lambda value: value is None)
    """Settings of flow_matching and continuous_adversarial_flow; otherwise unused, and no part of a run's identity."""
    size: Literal[tuple(SIZES)]  # type: ignore[valid-type]  # pydantic reads the names from the table
    nfe: Annotated[int, Field(ge=1, le=1024)] | Literal["any"]
    """Number of sampling steps that G is trained for; any: every pair of times."""
    form: Literal["direct", "residual"]
    """direct: G(x_s) = g(x_s); residual: G(x_s) = x_s - (s - t) g(x_s) (paper section 3)."""
    repeats: Literal[1, 2, 4]
    """How often G runs its blocks: XL/2 has 56 layers with 2, and 112 with 4. D runs its blocks once."""
    qk_norm: bool
    """RMS-normalize queries and keys in G and D, for stable bf16 training."""
    precision: Literal["fp32", "bf16"]
    """Precision of matrix products inside blocks; weights, activations between blocks, logits and losses are float32.
    bf16 needs qk_norm for stability. The penalties have their own, penalty.precision."""
    condition_on_source: bool
    """Concatenate G's input to D's input. Off in the paper: with it, training oscillates or diverges."""
    discriminator_updates: Count
    """Updates of D per update of G, each on its own batch; 1 in the paper, `ttur` in the released code."""
    reuse_forward: bool
    """Train D and G on the same batch with one forward pass of G; the paper draws separate batches."""
    label_noise: Fraction
    """Fraction of labels replaced by random labels in each batch; 0 in the paper. With 1, classes cannot be learned, a
    failure that the monitor should detect."""
    batch_size: Count
    """Global batch size, over all devices, of each update of D and of G."""
    lr: Positive
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    eps: Positive
    """Epsilon of AdamW."""
    weight_decay: NotNegative
    ema: Ema
    penalty: LazyPenalty
    logit_centering: NotNegative
    """lambda_cp, weight of the logit centering penalty."""
    transport: Transport
    gradient_normalization: GradientNormalization
    keep_discriminators: Annotated[tuple[Epochs, ...], Field(strict=False)]
    """Epochs at which the weights of D are kept beside the model, for guided runs that reload them."""
    schedule: Literal["fixed", "auto"]
    """fixed: the given phases; auto: one phase, whose until_epoch is an upper bound: the monitor decides when phases 2
    and 3 of the paper begin and when training stops."""
    phases: Annotated[tuple[Phase, ...], Field(strict=False, min_length=1)]
    selection: Selection | None
    """Select the EMA weights with the smallest distance; null: use the weights at the end of the run."""
    monitor: Monitor

    _number = field_validator("transport", mode="before")(lambda value: _constant_transport(value))

    @property
    def passes(self) -> int | Literal["any"]:
        """Forward passes of the sampled network per sample (NFE)."""
        return self.nfe if self.velocity is None else self.velocity.sampling.passes()

    @property
    def velocity(self) -> FlowSettings | None:
        """The settings of an objective whose network is a velocity; None for the others."""
        return self.flow if self.objective in VELOCITIES else None

    @property
    def guided(self) -> bool:
        """Whether any phase needs the classifier."""
        return any(phase.guidance is not None for phase in self.phases)

    @model_validator(mode="after")
    def _check(self) -> "Run":
        ends = [phase.until_epoch for phase in self.phases]
        if any(later <= earlier for earlier, later in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"expected until_epoch to rise from phase to phase, found {ends}")
        for start, phase in zip((0.0, *ends), self.phases, strict=False):
            if isinstance(phase.reload_discriminator, float | int) and phase.reload_discriminator > start:
                raise ValueError(
                    f"expected reload_discriminator to be an epoch before the phase starts at {start:g}, "
                    f"found {phase.reload_discriminator:g}"
                )
        late = [epoch for epoch in self.keep_discriminators if epoch > ends[-1]]
        if late:
            raise ValueError(f"expected keep_discriminators up to the last epoch, {ends[-1]:g}, found {late[0]:g}")
        reloads_on_stall = any(phase.reload_discriminator == "stall" for phase in self.phases)
        if reloads_on_stall and self.monitor.policy == "off":
            raise ValueError("expected monitor.policy warn or act, since a phase reloads D on a stall; found off")
        if self.schedule == "auto" and len(self.phases) > 1:
            raise ValueError(
                f"expected one phase for schedule auto, whose until_epoch is the upper bound; found {len(self.phases)}"
            )
        if self.schedule == "auto" and self.selection is not None:
            raise ValueError(
                "expected selection null with schedule auto, which ends with the EMA weights of the best probe"
            )
        if self.precision == self.penalty.precision == "bf16" and self.penalty.epsilon < BF16_EPSILON:
            raise ValueError(
                f"expected penalty.epsilon of at least {BF16_EPSILON} with penalties in bf16, since rounding hides the "
                f"effect of smaller steps, found {self.penalty.epsilon}"
            )
        if self.reuse_forward and self.discriminator_updates > 1:
            raise ValueError(
                f"expected discriminator_updates of 1 with reuse_forward, found {self.discriminator_updates}: one "
                "forward pass of G serves one batch"
            )
        if round(self.batch_size * self.penalty.batch_fraction) < 1:
            raise ValueError(
                f"expected penalty.batch_fraction to leave at least one of {self.batch_size} images, "
                f"found {self.penalty.batch_fraction}"
            )
        if self.objective in VELOCITIES:
            self._check_velocity()
        return self

    def _check_velocity(self) -> None:
        if self.flow is None:
            raise ValueError(f"expected a section `flow` with objective {self.objective}; found none")
        if any(phase.guidance is not None or phase.augment is not None for phase in self.phases):
            raise ValueError(
                f"expected no guidance or augment in the phases of objective {self.objective}, whose guidance is "
                "flow.sampling.guidance_scale"
            )
        unused: dict[str, Any] = {"schedule": "fixed", "repeats": 1, "condition_on_source": False}
        unused |= {"reuse_forward": False, "label_noise": 0.0}
        for name, value in unused.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"expected {name} {value} with objective {self.objective}, found {getattr(self, name)}"
                )


class Guided(Phase):
    """A further phase of a trained run, usually with guidance (phase 4 of the paper).

    G starts from the base run's EMA weights, D from its last weights; epochs count on from the end of the base run.
    Imported weights are continued with another objective.
    """

    base: Annotated[str, Field(alias="from")]
    """The run to continue, or the imported velocity, such as SiT's."""
    run: dict[str, Any] = Field({}, exclude_if=lambda value: not value)
    """Fields of a run that override the base run's, or those of `train` where the base is imported. With another
    objective, the run begins anew with the base's weights: its epochs, and its schedules, count from 0."""
    seed: Seed | None = None
    """Default: the seed of the base run, or that of `train`."""

    @property
    def begins_anew(self) -> bool:
        """Whether epochs count from 0 instead of from the end of the base run."""
        return "objective" in self.run

    def continued(self, base: Run) -> Run:
        """Return the base run with this phase. Raises pydantic's ValidationError if that run is invalid."""
        return continued(base, Phase(**{name: getattr(self, name) for name in Phase.model_fields}), self.run)


def continued(base: Run, phase: Phase, overrides: dict[str, Any]) -> Run:
    """Return a run with a further phase, and with fields overridden; a run of another objective has only that phase.

    Raises pydantic's ValidationError if that run is invalid.
    """
    before = () if "objective" in overrides else base.phases
    phases = [each.model_dump(mode="json") for each in (*before, phase)]
    return Run.model_validate(deep_merge(base.model_dump(mode="json"), overrides) | {"phases": phases})


class Affine(Section):
    """Random affine augmentation of the classifier's inputs."""

    probability: Fraction
    degrees: NotNegative
    """Largest rotation in either direction."""
    translate: Fraction
    """Largest translation, as a fraction of the side."""
    scale: Annotated[tuple[Positive, Positive], Field(strict=False)]
    """Smallest and largest scale factor."""


class Classifier(Section):
    """The guidance classifier C(x_t, t) on noisy latents (paper section 3)."""

    size: Literal[tuple(SIZES)]  # type: ignore[valid-type]  # as in Run
    batch_size: Count
    lr: Positive
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    weight_decay: NotNegative
    ema: Ema
    epochs: Epochs
    affine: Affine | None
    """Applied to latents, with reflection padding; the paper applies it to images before encoding."""


def _constant_transport(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"start": value, "end": value, "decay_epochs": 1.0}
    return value
