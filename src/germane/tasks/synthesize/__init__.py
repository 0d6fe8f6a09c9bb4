"""Synthesize: a model makes records of its own, from a name or from other records."""
