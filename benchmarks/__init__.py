"""How fast the project is, side by side with plain implementations of the same work: `make bench`."""
