"""Several checkpoints of one architecture into one.

Files without an underscore are methods. `_rule` holds what a data-free rule supplies, `_stream` how
weights flow through it, `_pool` what a pool is and how it is checked, `_live` the model in memory
that methods with data move, `_task` the task's contract.
"""
