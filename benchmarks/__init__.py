"""Speed beside plain implementations of the same work: `make bench`."""
