"""Attend: the same model, read in another way inside a block."""
