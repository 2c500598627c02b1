"""One model of FLOPs, memory and time."""
