"""Images in: folders of classes, their manifest, their latents, and the order training sees them in."""
