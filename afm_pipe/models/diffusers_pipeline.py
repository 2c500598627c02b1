"""Diffusers pipeline for adversarial flow models (arXiv 2511.22475): class-conditional images in one or a few steps.

This file is exported with the weights as pipeline.py:

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    images = pipe([207, 360], seed=0).images
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class AFMPipeline(DiffusionPipeline):
    """Generate class-conditional images from noise with the generator (`transformer`) and the decoder of `vae`."""

    def __init__(self, transformer: Any, vae: Any, id2label: dict[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(id2label=id2label or {})

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        seed: int = 0,
        latents: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate an image per entry of `class_labels` (numbers or names), image i from noise with seed + i.

        `latents` (N, c, h, w) replaces the noise. `num_inference_steps` is for any-step models. `output_type`: pil, pt
        (N, C, H, W in [-1, 1]) or latent (N, c, h, w, normalized as in training).
        """
        labels = torch.tensor([self._label(label) for label in class_labels], device=self.device)  # (N,)
        shape = (self.transformer.config.channels, *[self.transformer.config.latent_size] * 2)
        if latents is None:  # on the CPU, so that a seed gives the same noise on every machine
            noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(labels))]
            latents = torch.stack(noises)
        if tuple(latents.shape) != (len(labels), *shape):
            raise ValueError(f"Found latents of shape {tuple(latents.shape)}, expected {(len(labels), *shape)}.")
        latents = latents.to(self.device, self.transformer.dtype)
        images = self.transformer(latents, labels, num_inference_steps)  # (N, c, h, w)
        if output_type != "latent":
            images = self.vae.decode(images.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.clamp(-1, 1)
        if output_type == "pil":
            pixels = ((images.float() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            images = [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _label(self, label: int | str) -> int:
        count = self.transformer.config.num_classes
        if isinstance(label, str):
            found = [int(number) for number, name in self.config.id2label.items() if name == label]
            if len(found) != 1:
                raise ValueError(f"Found {len(found)} classes {label!r}, expected one of pipe.config.id2label.")
            return found[0]
        if not 0 <= int(label) < count:
            raise ValueError(f"Found class {label}, expected 0 to {count - 1}.")
        return int(label)
