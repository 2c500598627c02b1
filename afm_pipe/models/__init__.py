"""The networks: plain DiTs as generator and discriminator, the autoencoder, and their files."""
