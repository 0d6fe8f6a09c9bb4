"""A query to the member of a pool that should answer it, rewritten for that member.

Files without an underscore are methods. `_graph` says what a pool is, `_router` what every trained
router gives and how a query walks through several, `_task` the task's contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from germane.tasks.route._router import Answer, Decision, Router, ask, load_router

__all__ = ["Answer", "Decision", "Router", "ask", "load_router"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from germane.tasks.route import _router

    return getattr(_router, name)
