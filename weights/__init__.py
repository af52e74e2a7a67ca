"""Checkpoints in: what a file is, and how its tensors get our names."""
