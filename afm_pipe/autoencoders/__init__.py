"""Autoencoders: the seam to a latent space."""
