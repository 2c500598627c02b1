"""What a launcher such as torchrun tells a process by its environment."""

import os


def under_launcher() -> bool:
    """Return whether torchrun, or a launcher like it, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def env_rank() -> int:
    """Return this process's rank as its environment states it, before the process group is initialized."""
    return int(os.environ.get("RANK", "0"))


def env_world_size() -> int:
    """Return the number of processes as the environment states it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
