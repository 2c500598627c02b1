"""Files, locks, signals, progress, errors, paths and identity: used by every other package."""
