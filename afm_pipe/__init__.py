"""Adversarial Flow Models (arXiv 2511.22475) as one declarative pipeline, from images to tables."""

__version__ = "0.2.0"
