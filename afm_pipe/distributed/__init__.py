"""Groups of processes: launch settings, starting them, and sharing work between them."""
