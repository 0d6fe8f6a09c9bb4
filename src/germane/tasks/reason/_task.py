"""The reason task: questions, perhaps solved ones to show, a chat model and a method give answers.

Promised for every method: one answer for each question, with its response; every call to the model in
`calls.jsonl`, with the question it was for and its purpose; with a fixed model, the same answers twice.
"""

from __future__ import annotations

from typing import ClassVar

from germane.solver import Solve


class Reason(Solve):
    """Answer questions with a chat model, by a way of prompting."""

    task: ClassVar[str] = "reason"
