"""The tasks, a folder each: `_task.py` holds the contract, files without an underscore a method each."""
