"""The trainer: updates, callbacks, the monitor, and the checkpoints, curves and events of a run."""
