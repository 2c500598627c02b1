"""The paper's experiments in one dimension: the same losses on small networks, where the best map is known exactly."""
