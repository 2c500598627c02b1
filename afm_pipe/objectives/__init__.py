"""What training optimizes."""
