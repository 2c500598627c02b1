"""Images, their manifest and latents, and the order in which training sees them."""
