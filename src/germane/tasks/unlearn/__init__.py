"""Unlearn: a model behaves as if some records had never been trained on, and keeps the rest.

`_task.py` is the contract, `_unlearner.py` what a method supplies, `_search.py` how strongly it is
applied, `_measures.py` what is measured; the other files hold one method each.
"""
