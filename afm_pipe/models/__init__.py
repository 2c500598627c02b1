"""The networks, their model files, import of released weights and exports."""
