"""Evaluate: a model is measured with a suite, an evaluation with items and scoring of its own.

`_task.py` is the contract; the other files hold one suite each.
"""
