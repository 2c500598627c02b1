"""Params of the autoencoder, one class per kind.

To add a kind, add its class here and its module, named like the kind, to `afm_pipe/autoencoders/`.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from afm_pipe.params.base import Count, NotNegative, Positive, Section
from afm_pipe.params.encoders import ENCODERS
from afm_pipe.params.images import Data
from afm_pipe.params.latent_spec import LatentSpec


class AutoencoderParams(Section):
    """The autoencoder that maps images to latents and back. `kind` determines the other fields."""

    kinds: ClassVar[dict[str, type["AutoencoderParams"]]] = {}

    decoder: ClassVar[str | None] = None
    """Name of a decoder that only approximates its latent space's own: pictures and tables say so."""

    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Register the kind that the subclass's `kind: Literal[...]` names."""
        AutoencoderParams.kinds.update(dict.fromkeys(get_args(cls.model_fields["kind"].annotation), cls))

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in cls.kinds:
            raise ValueError(f"expected {' or '.join(cls.kinds)}, found {kind!r:.40}")
        return kind

    @model_validator(mode="wrap")
    @classmethod
    def _of_kind(cls, raw: Any, handler: ModelWrapValidatorHandler["AutoencoderParams"]) -> "AutoencoderParams":
        if cls is not AutoencoderParams or not isinstance(raw, dict):
            return handler(raw)
        kind = handler({"kind": raw["kind"]} if "kind" in raw else {}).kind
        return cls.kinds[kind].model_validate(raw)

    def latent_spec(self, data: Data) -> LatentSpec:
        """Return the spec of the latents, as far as params determine it. Raises ValueError for a wrong image size."""
        raise NotImplementedError  # not an abstract method: `_of_kind` makes an instance of this class


class KLTraining(Section):
    """Training of a small KL autoencoder, for images that no pretrained autoencoder fits."""

    block_out_channels: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Channels per resolution; each entry after the first halves the side."""
    layers_per_block: Count
    norm_groups: Count
    mid_attention: bool
    kl_weight: NotNegative
    """Weight of the KL divergence: a sum over the latent, averaged over the batch, divided by the number of pixel
    values of an image."""
    lr: Positive
    """Initial learning rate of Adam; it decays linearly to 0."""
    batch_size: Count
    updates: Count


class DiffusersParams(AutoencoderParams):
    """An autoencoder of diffusers: its latents and where its weights come from."""

    stochastic: ClassVar[bool]

    latent_channels: Count
    downsample: Count
    """Image pixels per latent pixel, along a side."""
    scaling_factor: Literal["measured"] | Positive
    """Factor on latents; measured: 1 / standard deviation over the training images."""
    pretrained: str | None
    """Folder or hub name of the pretrained autoencoder."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Expected sha256 of the pretrained diffusion_pytorch_model.safetensors."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.pretrained is not None and self.sha256 is None:
            raise ValueError("expected `sha256` beside `pretrained`: external weights are checked before use")
        return self

    def latent_spec(self, data: Data) -> LatentSpec:
        """Return the spec of the latents, as far as params determine it. Raises ValueError for a wrong image size."""
        if data.image_size % self.downsample:
            raise ValueError(
                f"data.image_size: expected a multiple of autoencoder.downsample {self.downsample}, "
                f"found {data.image_size}"
            )
        side = data.image_size // self.downsample
        factor = None if self.scaling_factor == "measured" else self.scaling_factor
        return LatentSpec((self.latent_channels, side, side), self.stochastic, scaling_factor=factor)


class KLParams(DiffusersParams):
    """A diffusers AutoencoderKL, such as SD-VAE."""

    stochastic = True

    kind: Literal["kl"]
    """kl: diffusers AutoencoderKL, such as SD-VAE."""
    scaling_factor: Literal["measured"] | Positive
    """Factor on latents: 0.18215 for SD-VAE; measured: 1 / standard deviation over the training images."""
    pretrained: str | None
    """Folder or hub name of a diffusers AutoencoderKL; null: train one according to `train`."""
    train: KLTraining | None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.pretrained is None and self.train is None:
            raise ValueError("expected `pretrained` or `train`, found neither")
        if self.pretrained is not None and self.scaling_factor == "measured":
            raise ValueError("expected a number as `scaling_factor` beside `pretrained` (0.18215 for SD-VAE)")
        if self.pretrained is None and self.train and 2 ** (len(self.train.block_out_channels) - 1) != self.downsample:
            raise ValueError(
                f"expected downsample {2 ** (len(self.train.block_out_channels) - 1)} for "
                f"{len(self.train.block_out_channels)} block_out_channels, found {self.downsample}"
            )
        return self


class TinyParams(DiffusersParams):
    """A pretrained diffusers AutoencoderTiny, such as TAESD."""

    stochastic = False
    decoder = "TAESD"

    kind: Literal["tiny"]
    """tiny: pretrained diffusers AutoencoderTiny, such as TAESD, a small stand-in for SD-VAE."""
    scaling_factor: Literal["measured"] | Positive
    """Factor on latents: 1 for those of TAESD, which are SD-VAE's times 0.18215; measured: 1 / standard deviation over
    up to 1,000 of the training images."""
    pretrained: str
    """Folder or hub name of a diffusers AutoencoderTiny, such as madebyollin/taesd."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Expected sha256 of its diffusion_pytorch_model.safetensors."""


class DecoderTraining(Section):
    """The convolutional decoder of a representation and its training."""

    widths: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
    """Channels per resolution, from the latents' to the images'; each entry after the first doubles the side."""
    noise: NotNegative
    """Robustness to what a generator gets wrong (Zheng et al. 2025, section 4.3): each normalized latent gets Gaussian
    noise whose deviation is |n|, n from N(0, noise^2). 0: none, the best reconstructions."""
    lr: Positive
    """Initial learning rate of Adam; it decays linearly to 0."""
    batch_size: Count
    updates: Count


class RepresentationParams(AutoencoderParams):
    """The feature map of a frozen pretrained encoder as the latent, and a decoder trained on the images."""

    kind: Literal["representation"]
    """representation: the feature map of a frozen pretrained encoder, and a decoder trained on the images."""
    encoder: Literal[tuple(ENCODERS)]  # type: ignore[valid-type]  # pydantic reads the names from the table
    """efficientnet_lite0: from pip, trained on ImageNet; dinov2_*: timm's weights as NAME.safetensors in the weights
    folder."""
    layer: Count
    """Block whose output is the latent, counted from 1; the tokens of DINOv2 get the network's final norm."""
    input_size: Count
    """Side to which the encoder's images are resized, in pixels: a multiple of the layer's stride."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """Expected sha256 of the encoder's weights; null: any that the pip package has."""
    train: DecoderTraining

    @model_validator(mode="after")
    def _fits(self) -> Self:
        encoder = ENCODERS[self.encoder]
        if self.layer > len(encoder.maps):
            raise ValueError(
                f"expected a layer from 1 to {len(encoder.maps)}, the blocks of {self.encoder}; found {self.layer}"
            )
        stride = encoder.maps[self.layer - 1].stride
        if self.input_size % stride:
            raise ValueError(
                f"expected an input_size that is a multiple of {stride}, the stride of layer {self.layer} of "
                f"{self.encoder}; found {self.input_size}"
            )
        if encoder.weights is not None and self.sha256 is None:
            raise ValueError(
                f"expected `sha256` of {encoder.weights}, found null: external weights are checked before use"
            )
        return self

    def latent_spec(self, data: Data) -> LatentSpec:
        """Return the spec of the latents, as far as params determine it. Raises ValueError for maps that do not fit."""
        channels, stride = ENCODERS[self.encoder].maps[self.layer - 1]
        side, levels = self.input_size // stride, len(self.train.widths)
        if side * 2 ** (levels - 1) != data.image_size:
            raise ValueError(
                f"autoencoder: expected a feature map whose side is data.image_size {data.image_size} / a power of 2, "
                f"and one of train.widths for it and for each doubling; found a map of {side} x {side} (input_size "
                f"{self.input_size}, stride {stride}) and {levels} widths, which make {side * 2 ** (levels - 1)} pixels"
            )
        return LatentSpec((channels, side, side), stochastic=False)
