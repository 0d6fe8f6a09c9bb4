"""Reason: prompting methods by which a chat model answers questions that hold what it should not heed.

`_task.py` is the contract; what a method supplies is in `germane/solver.py`; the other files hold one
method each.
"""
