"""Erase: a diffusion pipeline no longer draws a concept, and draws the rest as before.

`_task.py` is the contract, `_pipeline.py` opens pipelines, `_pictures.py` reads records, `_measures.py`
is what is measured, `_eraser.py` what a method supplies; the other files hold one method each.
"""
