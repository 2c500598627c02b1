"""Checks and speeds on one GPU, with made inputs: no data, no network, no other packages than training needs."""
