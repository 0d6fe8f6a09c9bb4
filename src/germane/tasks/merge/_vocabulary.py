"""Whether two model folders number their tokens alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from germane.core.errors import CheckpointError

_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def check_vocabulary(base: Path, member: Path) -> None:
    """Raise `CheckpointError` if both folders carry a tokenizer and a token has two numbers.

    A member without tokenizer files is taken to use the base's.
    """
    for name in _FILES:
        ours, theirs = base / name, member / name
        if not (ours.exists() and theirs.exists()):
            continue
        if ours.read_bytes() == theirs.read_bytes():
            return
        difference = _difference(_tokens(ours), _tokens(theirs))
        if difference:
            raise CheckpointError(
                f"{member}: its vocabulary differs from the base's ({name}: {difference}), so equal "
                "rows of the embeddings mean different tokens; merge models of one tokenizer, or "
                "retrain the member's embeddings on the base's tokenizer first."
            )
        return


def _tokens(file: Path) -> dict[str, int]:
    """Token -> number. A file of a form not understood is one token: equal only to its own bytes."""
    if file.suffix == ".txt":
        return {token: n for n, token in enumerate(file.read_text(encoding="utf-8").splitlines())}
    if file.suffix != ".json":
        return {file.read_bytes().hex(): 0}
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "vocab.json":
        return dict(content)
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: [token, log-probability] by number
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {**vocabulary, **added}


def _difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    for token, number in ours.items():
        if theirs.get(token, number) != number:
            return f"{token!r} is number {number} in the base and {theirs[token]} here"
    if len(ours) != len(theirs):
        return f"{len(ours)} tokens in the base and {len(theirs)} here"
    missing = next((token for token in ours if token not in theirs), None)
    return "" if missing is None else f"{missing!r} of the base is not there"
