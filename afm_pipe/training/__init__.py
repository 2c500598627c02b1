"""The method: losses, gradient normalisation, schedules, and a loop that survives being killed."""
