"""Ground: a chat model answers from passages, some of which are irrelevant or mislead.

`_task.py` is the contract; what a method supplies is in `germane/solver.py`; the other files hold one
method each.
"""
