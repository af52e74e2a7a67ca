"""Checkpoints of other programs and of this one: what a file is, and how its tensors become a model."""
