"""The paper's 1-D toy experiment: the same losses on small networks, where the optimal map is known exactly."""
