"""How good are the samples: features, Frechet and kernel distances, and the reference they are held against."""
