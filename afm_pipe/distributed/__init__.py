"""Processes that work together: how they start, and how they share work."""
