"""Adversarial Flow Model: an image of a class in one step, or a few (arXiv 2511.22475). This file stands alone.

It travels with exported weights as their pipeline.py:

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
    """Class to image: noise by seed, the generator (`transformer`), the autoencoder's decoder (`vae`)."""

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
        """Draw one image of each class in `class_labels` (numbers or names), image i from a generator seeded seed + i.

        `latents` (N, c, h, w) takes the place of that noise. `num_inference_steps` is for models of any number of
        steps. `output_type`: pil, pt (N, C, H, W in [-1, 1]) or latent (N, c, h, w, scaled as in training).
        """
        labels = torch.tensor([self._label(label) for label in class_labels], device=self.device)  # (N,)
        shape = (self.transformer.config.channels, *[self.transformer.config.latent_size] * 2)
        if latents is None:  # on the CPU, where a seed means the same on every machine
            noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(labels))]
            latents = torch.stack(noises)
        if tuple(latents.shape) != (len(labels), *shape):
            raise ValueError(f"Found latents of shape {tuple(latents.shape)}, expected {(len(labels), *shape)}.")
        latents = latents.to(self.device, self.transformer.dtype)
        made = self.transformer(latents, labels, num_inference_steps)  # (N, c, h, w)
        if output_type != "latent":
            made = self.vae.decode(made.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.clamp(-1, 1)
        if output_type == "pil":
            pixels = ((made.float() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            made = [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def _label(self, asked: int | str) -> int:
        count = self.transformer.config.num_classes
        if isinstance(asked, str):
            found = [int(label) for label, name in self.config.id2label.items() if name == asked]
            if len(found) != 1:
                raise ValueError(f"Found {len(found)} classes {asked!r}, expected one of pipe.config.id2label.")
            return found[0]
        if not 0 <= int(asked) < count:
            raise ValueError(f"Found class {asked}, expected 0 to {count - 1}.")
        return int(asked)
