"""Kind representation: the feature map of a frozen pretrained encoder, and a decoder trained on the images.

The folder holds the decoder and the normalization. The encoder's weights stay where they came from, and config.json
holds their hash; decoding does not need them.

Legend: N images, B batch size; C, H, W channels, height and width of images; c, h, w of latents.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from afm_pipe.autoencoders.base import Autoencoder
from afm_pipe.autoencoders.decoder import Decoder, build_decoder, train_decoder
from afm_pipe.autoencoders.encoders import Encoder
from afm_pipe.autoencoders.measuring import reconstruction_mse
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.reading import LazyImages, load_images, require_images
from afm_pipe.params import LatentSpec, Params
from afm_pipe.params.autoencoders import RepresentationParams
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.progress import Progress

CLASS_NAME = "RepresentationAutoencoder"
CONFIG, WEIGHTS = "config.json", paths.AUTOENCODER_WEIGHTS.name
IN_MEMORY = 4 << 30  # bytes; larger data sets are read on access
NORMALIZED_IMAGES = 10_000  # each with its mirror: a deviation is measured to 1 %
NORMALIZING_BATCH = 32
LEAST_DEVIATION = 0.01  # of the mean one: an element that hardly varies, as under a black border, is not amplified
DECODER = "decoder."


class RepresentationAutoencoder(Autoencoder, kind="representation"):
    """A frozen encoder's feature maps, normalized per element, and their decoder. Deterministic."""

    def __init__(self, settings: RepresentationParams, decoder: Decoder, mean: Tensor, std: Tensor) -> None:
        """Hold a decoder and the normalization (c, h, w); the encoder is loaded when it is first used."""
        self.settings, self.decoder = settings, decoder.eval().requires_grad_(False)
        channels, height, width = mean.shape
        self.spec = LatentSpec((channels, height, width), stochastic=False, mean=mean, std=std)
        self.encoder_sha256 = settings.sha256
        self._encoder: Encoder | None = None

    @classmethod
    def make(cls, params: Params, folder: Path, device: torch.device) -> Generator[Progress, None, None]:
        """Measure the normalization on the images and train the decoder.

        Raises UserError, before any image is read, for an encoder that is missing or not the expected one.
        """
        settings, (channels, _, _) = _settings(params), params.latent_shape
        encoder = load_encoder(settings).to(device)
        manifest = read_manifest(paths.MANIFEST)
        images: Any = LazyImages(manifest, params.data)
        if images.nbytes < IN_MEMORY:
            images = yield from load_images(manifest, params.data)
        else:
            yield from require_images(manifest, params.data)
        mean, std = yield from measured_normalization(encoder, images, params.data.mirror)
        decoder = build_decoder(channels, settings.train.widths, params.data.channels, params.seed)
        made = cls(settings, decoder, mean.cpu(), std.cpu())
        made._encoder, made.encoder_sha256 = encoder, encoder.sha256
        made.to(device)

        def encode(batch: Tensor) -> tuple[Tensor, Tensor]:
            return made.spec.normalize(made.encode(batch)), made.spec.to_pixels(batch.to(device))

        decoder.requires_grad_(True)
        yield from train_decoder(decoder, settings.train, images, encode, params.data.mirror, params.seed)
        made.save(folder)
        write_json(folder / "training.json", {"reconstruction_mse": reconstruction_mse(made, images, params.seed)})

    @classmethod
    def load(cls, params: Params, folder: Path) -> Self:
        """Load decoder and normalization from `folder`. Raises UserError for those of other params, or damaged ones."""
        settings = _settings(params)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"Found no {folder / name}: run `dvc repro autoencoder`.")
        config = read_json(folder / CONFIG)
        found = config.get("_class_name") if isinstance(config, dict) else None
        if found != CLASS_NAME:
            raise UserError(
                f"Found {folder / CONFIG} of {str(found)[:60]}, expected {CLASS_NAME} as autoencoder.kind "
                "representation makes: run `dvc repro autoencoder`."
            )
        for name, expected in _described(settings).items():
            if config.get(name) != expected:
                raise UserError(
                    f"Found {folder} with {name} {str(config.get(name))[:60]}, expected {expected} "
                    f"(autoencoder.{name}): run `dvc repro autoencoder`."
                )
        shape = params.latent_shape
        expected_shapes = dict.fromkeys(("mean", "std"), torch.Size(shape))
        decoder = build_decoder(shape[0], settings.train.widths, params.data.channels, params.seed)
        expected_shapes |= {DECODER + name: value.shape for name, value in decoder.state_dict().items()}
        tensors = read_weights(folder / WEIGHTS, expected_shapes)
        mean, std = tensors.pop("mean"), tensors.pop("std")
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise UserError(
                f"Found a mean or deviation not finite, or a deviation not above 0, in {folder / WEIGHTS}: "
                "run `dvc repro autoencoder`."
            )
        decoder.load_state_dict({name.removeprefix(DECODER): value for name, value in tensors.items()})
        loaded = cls(settings, decoder, mean, std)
        loaded.encoder_sha256 = str(config.get("encoder_sha256"))
        return loaded

    def save(self, folder: Path) -> None:
        """Write decoder, normalization and config into `folder`; equal weights give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self.spec.mean is not None and self.spec.std is not None
        state = {DECODER + name: value.cpu().contiguous() for name, value in self.decoder.state_dict().items()}
        described = {"_class_name": CLASS_NAME, **_described(self.settings), "encoder_sha256": self.encoder_sha256}
        state |= {"mean": self.spec.mean.cpu(), "std": self.spec.std.cpu()}
        # The weights file identifies the latents, so it names the encoder, in one entry: several have no fixed order.
        save_file(state, folder / WEIGHTS, {"encoder": json.dumps(described, sort_keys=True)})
        write_json(folder / CONFIG, described)

    def to(self, device: torch.device | str) -> Self:
        """Move to a device and return self."""
        self.device = torch.device(device)
        self.decoder.to(self.device)
        if self._encoder is not None:
            self._encoder.to(self.device)
        return self

    def check(self, params: Params) -> None:
        """Raise UserError unless the latents match params and the encoder is the one that the decoder was trained with.

        The encoder is loaded.
        """
        super().check(params)
        self._loaded()

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            encoder = load_encoder(self.settings)
            if encoder.sha256 != self.encoder_sha256:
                raise UserError(
                    f"Found {encoder.name} with sha256 {encoder.sha256}, expected {self.encoder_sha256}, with which "
                    f"{paths.AUTOENCODER} was made: restore those weights, or run `dvc repro -f autoencoder`."
                )
            self._encoder = encoder.to(self.device)
        return self._encoder

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._loaded()(pixels)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.spec.normalize(latents))


def load_encoder(settings: RepresentationParams) -> Encoder:
    """Load the encoder of params. Raises UserError for missing or other weights."""
    return Encoder(settings.encoder, settings.layer, settings.input_size, settings.sha256)


@torch.no_grad()
def measured_normalization(
    encoder: Encoder, images: Any, mirror: bool
) -> Generator[Progress, None, tuple[Tensor, Tensor]]:
    """Return mean and deviation (c, h, w) float32 of the maps of up to 10,000 of the `images` (N, C, H, W) uint8.

    With `mirror`, also of their mirrors. Raises UserError for maps that are not finite or do not vary.
    """
    chosen = np.linspace(0, len(images) - 1, min(len(images), NORMALIZED_IMAGES)).round().astype(int)
    spec, device = LatentSpec((0, 0, 0), stochastic=False), encoder.shift.device
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for start in range(0, len(chosen), NORMALIZING_BATCH):
        batch = torch.from_numpy(images[chosen[start : start + NORMALIZING_BATCH].tolist()])
        for side in (batch, batch.flip(-1)) if mirror else (batch,):
            maps = encoder(spec.to_pixels(side.to(device))).double().cpu()  # (B, c, h, w)
            total, squares, count = total + maps.sum(0), squares + maps.square().sum(0), count + len(maps)
        yield Progress(min(start + NORMALIZING_BATCH, len(chosen)), len(chosen), "images", "normalization")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if not std.isfinite().all() or std.mean() == 0:
        raise UserError(
            f"Found feature maps of {encoder.name} that are {'equal' if std.isfinite().all() else 'not finite'}, "
            "expected ones that differ: use other images or another layer."
        )
    return mean.float(), std.clamp(min=LEAST_DEVIATION * float(std.mean())).float()


def _described(settings: RepresentationParams) -> dict[str, Any]:
    """Return what config.json says of the encoder and what params must say."""
    return {"encoder": settings.encoder, "layer": settings.layer, "input_size": settings.input_size}


def read_weights(path: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Read tensors of the expected names and shapes. Raises UserError for others, and for a damaged file."""
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            if not wrong:
                tensors = {name: file.get_tensor(name).float() for name in found}
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # others for unknown dtypes
        raise UserError(f"Found {path} damaged ({str(error)[:200]}): run `dvc repro autoencoder`.") from None
    if wrong:
        raise UserError(
            f"Found {len(wrong)} tensors of other names or shapes than params say in {path}, the first "
            f"{wrong[0][:60]}: run `dvc repro autoencoder`."
        )
    return tensors


def _settings(params: Params) -> RepresentationParams:
    assert isinstance(params.autoencoder, RepresentationParams)
    return params.autoencoder
