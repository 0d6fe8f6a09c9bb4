"""germane: find what is relevant in the models and data you hold, and act on it.

The verbs are functions here, imported when first used; `import germane` loads no torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from germane.attention import attend
    from germane.comparison import compare
    from germane.edited import load_edited
    from germane.recipe import Result, read_recipe, run
    from germane.retrieval import load_index
    from germane.tasks.route import ask

__all__ = [
    "ask",
    "attend",
    "compare",
    "edit",
    "erase",
    "evaluate",
    "ground",
    "load_edited",
    "load_index",
    "merge",
    "read_recipe",
    "reason",
    "retrieve",
    "route",
    "run",
    "synthesize",
    "unlearn",
]

_LAZY = {
    "ask": "germane.tasks.route",
    "attend": "germane.attention",
    "compare": "germane.comparison",
    "load_edited": "germane.edited",
    "load_index": "germane.retrieval",
    "read_recipe": "germane.recipe",
    "run": "germane.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'germane' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def merge(
    base: str,
    pool: Sequence[str],
    *,
    method: str,
    out: str | os.PathLike[str],
    data: Sequence[Any] = (),
    evaluate: Sequence[Any] = (),
    heads: Sequence[str] = (),
    save_tasks: bool = False,
    decoys: str = "refuse",
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Merge the checkpoints of a pool into one; see `germane explain merge`.

    Args:
        base: The model the others descend from: a folder or hub id.
        pool: Checkpoints and LoRA adapters: folders, folders of folders, globs, hub ids.
        method: Name of the method, such as "frank-wolfe".
        out: Folder of the result.
        data: Records for methods that need them: "name=path", mappings, or `Data`.
        evaluate: Records to score base, result and members on.
        heads: Patterns of tensors kept out of the merge.
        save_tasks: Also save a whole model for each member's head.
        decoys: "refuse", "report" or "drop" copies, random weights and strangers.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The method's settings.
    """
    from germane.recipe import run_task

    arguments = {
        "base": str(base), "pool": [str(path) for path in pool], "data": list(data),
        "evaluate": list(evaluate), "heads": list(heads), "save_tasks": save_tasks, "decoys": decoys,
    }  # fmt: skip
    return run_task("merge", method, arguments, settings, out, seed=seed, overwrite=overwrite)


def route(
    graph: str,
    *,
    method: str,
    out: str | os.PathLike[str],
    data: Sequence[Any] = (),
    evaluate: Sequence[Any] = (),
    master: str = "",
    max_steps: int = 8,
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Train a router for a pool; see `germane explain route`. `germane.ask` sends queries through it.

    Args:
        graph: The pool: a YAML or JSON file with workers, masters and their edges.
        method: Name of the method, such as "functional-token".
        out: Folder of the router.
        data: Labelled queries: "name=path", mappings, or `Data`.
        evaluate: Labelled queries to score on.
        master: The master to train; default: the graph's entry.
        max_steps: Longest walk of a query through the graph.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The method's settings.
    """
    from germane.recipe import run_task

    arguments = {
        "graph": str(graph), "data": list(data), "evaluate": list(evaluate),
        "master": master, "max_steps": max_steps,
    }  # fmt: skip
    return run_task("route", method, arguments, settings, out, seed=seed, overwrite=overwrite)


def evaluate(
    model: str,
    data: Sequence[Any],
    *,
    method: str,
    out: str | os.PathLike[str],
    base: str = "",
    retrained: str = "",
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Measure a model with a suite; see `germane explain evaluate`.

    Args:
        model: A folder or hub id.
        data: The suite's records by role, as "role=path", mappings, or `Data`.
        method: Name of the suite, such as "muse".
        out: Folder of the evidence and of every item.
        base: A model to measure beside it.
        retrained: A model trained without what was to be unlearned.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The suite's settings.
    """
    from germane.recipe import run_task

    arguments = {"model": str(model), "data": list(data), "base": base, "retrained": retrained}
    return run_task("evaluate", method, arguments, settings, out, seed=seed, overwrite=overwrite)


def unlearn(
    model: str,
    forget: Any,
    *,
    method: str,
    out: str | os.PathLike[str],
    retain: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Result:
    """Make a model behave as if some records had never been trained on; see `germane explain unlearn`.

    Args:
        model: The model that knows the records: a folder or hub id.
        forget: Records to forget: "path", "name=path", a mapping, or `Data`.
        method: Name of the method, such as "gradient-ascent".
        out: Folder of the result.
        retain: Records to keep.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        settings: The method's settings.
        **arguments: The task's further arguments: holdout, initial, retrained, budget, trials, suites,
            data, evaluate.
    """
    from germane.recipe import run_task

    given = {"model": str(model), "forget": forget, "retain": retain, **arguments}
    return run_task("unlearn", method, given, settings or {}, out, seed=seed, overwrite=overwrite)


def edit(
    model: str,
    edits: Any = None,
    *,
    method: str,
    out: str | os.PathLike[str],
    take_back: Sequence[str] = (),
    general: Any = None,
    evaluate: Sequence[Any] = (),
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Make a model state changed facts; see `germane explain edit`. `germane.load_edited` opens the result.

    Args:
        model: The model, or one that was edited before: a folder or hub id; or an address.
        edits: The edits: "path", "name=path", a mapping, or `Data`.
        method: Name of the method, such as "wise".
        out: Folder of the result.
        take_back: Ids of earlier edits to undo.
        general: Texts that have nothing to do with the edits.
        evaluate: Records to score before and after on.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The method's settings.
    """
    from germane.recipe import run_task

    arguments = {
        "model": str(model), "edits": edits, "take_back": list(take_back), "general": general,
        "evaluate": list(evaluate),
    }  # fmt: skip
    return run_task("edit", method, arguments, settings, out, seed=seed, overwrite=overwrite)


def synthesize(
    model: str,
    data: Sequence[Any] = (),
    *,
    method: str,
    out: str | os.PathLike[str],
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Have a model make records; see `germane explain synthesize`.

    Args:
        model: The model that writes: a folder or hub id.
        data: The method's records by role, as "role=path", mappings, or `Data`.
        method: Name of the method, such as "rwku".
        out: Folder of the files.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The method's settings.
    """
    from germane.recipe import run_task

    arguments = {"model": str(model), "data": list(data)}
    return run_task("synthesize", method, arguments, settings, out, seed=seed, overwrite=overwrite)


def erase(
    model: str,
    concept: str | int,
    forget: Any,
    keep: Any,
    *,
    method: str,
    out: str | os.PathLike[str],
    seed: int = 0,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Result:
    """Make a diffusion pipeline draw a concept no more; see `germane explain erase`.

    Args:
        model: The pipeline: a folder of diffusers, or hub id.
        concept: A class number, or words that the prompts hold.
        forget: Images of the concept: "path", "name=path", a mapping, or `Data`.
        keep: Images of others.
        method: Name of the method, such as "salun".
        out: Folder of the result.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        settings: The method's settings.
        **arguments: The task's further arguments: judge, absent, samples, steps, guidance, batch, evaluate.
    """
    from germane.recipe import run_task

    given = {"model": str(model), "concept": str(concept), "forget": forget, "keep": keep, **arguments}
    return run_task("erase", method, given, settings or {}, out, seed=seed, overwrite=overwrite)


def reason(
    model: str,
    questions: Any,
    *,
    method: str,
    out: str | os.PathLike[str],
    demonstrations: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Answer questions with a chat model, by a way of prompting; see `germane explain reason`.

    Args:
        model: A folder, a hub id, or an address, "http://HOST/v1#MODEL".
        questions: "path", "name=path", a mapping, or `Data`.
        method: Name of the method, such as "direct".
        out: Folder of the answers and of every call.
        demonstrations: Solved questions that may be shown.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The method's settings.
    """
    from germane.recipe import run_task

    arguments = {"model": str(model), "questions": questions, "demonstrations": demonstrations}
    return run_task("reason", method, arguments, settings, out, seed=seed, overwrite=overwrite)


def ground(
    model: str,
    questions: Any,
    *,
    method: str,
    out: str | os.PathLike[str],
    demonstrations: Any = None,
    distractors: Sequence[int] = (),
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Answer questions from passages; see `germane explain ground`.

    Args:
        model: A folder, a hub id, or an address, "http://HOST/v1#MODEL".
        questions: Records with passages: "path", "name=path", a mapping, or `Data`.
        method: Name of the method, such as "plain".
        out: Folder of the answers and of every call.
        demonstrations: Solved questions that may be shown.
        distractors: Numbers of passages that are not right to put beside those that are.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The method's settings.
    """
    from germane.recipe import run_task

    arguments = {
        "model": str(model), "questions": questions, "demonstrations": demonstrations,
        "distractors": list(distractors),
    }  # fmt: skip
    return run_task("ground", method, arguments, settings, out, seed=seed, overwrite=overwrite)


def retrieve(
    corpus: str,
    queries: Any = None,
    *,
    method: str,
    out: str | os.PathLike[str],
    qrels: str = "",
    depth: int = 100,
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Find the passages of a corpus that answer queries; see `germane explain retrieve`.

    Args:
        corpus: Passages with _id, title and text, or the folder of an index made earlier.
        queries: Records with _id and text.
        method: Name of the method, such as "bm25".
        out: Folder of the index and of the rankings; `germane.load_index` opens it.
        qrels: Judgements to score on.
        depth: How many passages a query gets.
        seed: Of everything random.
        overwrite: Replace `out` if it is there.
        **settings: The method's settings.
    """
    from germane.recipe import run_task

    arguments = {"corpus": str(corpus), "queries": queries, "qrels": str(qrels), "depth": depth}
    return run_task("retrieve", method, arguments, settings, out, seed=seed, overwrite=overwrite)
