"""The tables of the study: cells that are trained for them, each once, however many tables it stands in."""
