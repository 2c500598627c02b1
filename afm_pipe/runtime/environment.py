"""Environment variables that a launcher such as torchrun sets."""

import os


def under_launcher() -> bool:
    """Return whether torchrun or a similar launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def env_rank() -> int:
    """Return the rank of this process, before the process group is initialized."""
    return int(os.environ.get("RANK", "0"))


def env_world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))
