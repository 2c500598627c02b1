"""Adversarial flow models (paper section 3)."""
