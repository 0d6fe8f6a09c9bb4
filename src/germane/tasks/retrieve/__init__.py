"""Retrieve: a corpus and queries give ranked passages.

Files without an underscore are methods. `_task` is the task's contract, `_collection` reads what it is
given, `_scores` measures, `_models` finds the methods' models; what a method supplies, and how an index is
opened, is in `germane.retrieval`.
"""

from germane.retrieval import Hit, Index, load_index

__all__ = ["Hit", "Index", "load_index"]
