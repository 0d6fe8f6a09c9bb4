"""Edit: a model states changed facts, and the rest of what it says stays.

`_task.py` is the contract, `_records.py` reads edits, `_measures.py` is what is measured; what a method
supplies is in `germane/edited.py`; the other files hold one method each.
"""
