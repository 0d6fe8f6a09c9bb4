"""Records as edits: germane's own form, and those of the published sets.

A record of germane's own form has `prompt` and `answer`, and may have `id`, `subject`, `statement`,
`rephrase` (a text or several), `locality` and `portability` (pairs, or objects, of a prompt and its
answer), `irrelevant`, `other` and `loss`. The forms of ZsRE (as MEND and EasyEdit write it), KnowEdit,
CounterFact, CounterFact-Hard (EREN) and canonical examples are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from germane.core.errors import RecordsError, nearest
from germane.core.records import Data, Row, open_rows
from germane.edited import Edit, Pair

# Field of an edit -> what published sets call it.
_NAMES = {
    "prompt": ("prompt", "src", "prefix"),
    "answer": ("answer", "target_new", "alt", "suffix", "suffix1"),
    "other": ("other", "suffix2"),
    "loss": ("loss",),
    "rephrase": ("rephrase", "rephrase_prompt", "rephrase_prompts"),
    "locality": ("locality", "neighborhood"),
    "portability": ("portability",),
    "subject": ("subject", "subject_name"),
    "statement": ("statement",),
    "irrelevant": ("irrelevant", "loc"),
}


def read_edits(data: Data, earlier: Sequence[Edit] = ()) -> list[Edit]:
    """The edits of a file or data set, in their order; those without an id are numbered on.

    Args:
        data: The records.
        earlier: Edits that were made before, whose ids are taken.

    Raises:
        RecordsError: A record lacks what an edit needs, or its id is taken.
    """
    edits = []
    taken = {edit.id for edit in earlier}
    for number, row in enumerate(open_rows(data), 1):
        place = f"{data.path}, record {number}"
        edit = _edit(_plain(row, data, place), len(earlier) + number, place)
        if edit.id in taken:
            raise RecordsError(
                f"{place}: there is an edit {edit.id!r} already: edits are told apart by it."
            )
        taken.add(edit.id)
        edits.append(edit)
    return edits


def _plain(row: Row, data: Data, place: str) -> Row:
    """A record of any known form in germane's own."""
    if "requested_rewrite" in row:
        return _counterfact(row)
    if "edit_scope" in row:
        return _counterfact_hard(row, place)
    names = _NAMES | {
        "prompt": (data.prompt, *_NAMES["prompt"]), "answer": (data.answer, *_NAMES["answer"]),
    }  # fmt: skip
    plain = {
        name: row[alias] for name, aliases in names.items() for alias in reversed(aliases) if alias in row
    }
    for name in ("prompt", "answer"):
        if name not in plain:
            raise RecordsError(
                f"{place}: has no field {name!r}{nearest(name, row)} An edit needs a prompt and the new "
                f"answer. Fields: {', '.join(row)}."
            )
    if "loc" in row and "loc_ans" in row:
        plain.setdefault("locality", [(row["loc"], row["loc_ans"])])
    return plain | {name: row[name] for name in ("id", "case_id") if name in row}


def _counterfact(row: Row) -> Row:
    wanted = row["requested_rewrite"]
    true = wanted.get("target_true", {}).get("str", "")
    return {
        "id": row.get("case_id"), "prompt": wanted["prompt"].format(wanted["subject"]),
        "answer": wanted["target_new"]["str"], "subject": wanted["subject"],
        "rephrase": row.get("paraphrase_prompts", []),
        "locality": [(prompt, true) for prompt in row.get("neighborhood_prompts", [])],
    }  # fmt: skip


def _counterfact_hard(row: Row, place: str) -> Row:
    """The file's questions beside the edit stand without answers, its true answers in no order of theirs.

    Of such a question it only matters that the answer stays, so the new answer stands for its length.
    """
    scope = row["edit_scope"]
    if not scope:
        raise RecordsError(f"{place}: its edit_scope is empty: an edit needs a prompt and the new answer.")
    unrelated = row.get("unrelated", {})
    probes = [probe for name in ("same_subj", "neighbor_subj") for probe in unrelated.get(name, [])]
    return {
        "prompt": scope[0][0], "answer": scope[0][1], "subject": row.get("subject_name", ""),
        "statement": row.get("edit_statement", ""), "rephrase": [pair[0] for pair in scope[1:]],
        "locality": [(probe, scope[0][1]) if isinstance(probe, str) else probe for probe in probes],
    }  # fmt: skip


def _edit(row: Row, number: int, place: str) -> Edit:
    prompt = _text(row["prompt"], "prompt", place)
    name = row.get("id", row.get("case_id"))
    rephrase = row.get("rephrase") or []
    return Edit(
        id=str(number if name is None else name),
        prompt=prompt,
        answer=with_blank(prompt, _text(_first(row["answer"]), "answer", place)),
        subject=_text(row.get("subject") or "", "subject", place, empty=True),
        statement=_text(row.get("statement") or "", "statement", place, empty=True),
        rephrase=[
            _text(each, "rephrase", place)
            for each in ([rephrase] if isinstance(rephrase, str) else rephrase)
        ],
        locality=list(_pairs(row.get("locality"), "locality", place)),
        portability=list(_pairs(row.get("portability"), "portability", place)),
        irrelevant=_text(row.get("irrelevant") or "", "irrelevant", place, empty=True),
        **_wanted(row, prompt, place),
    )


def _wanted(row: Row, prompt: str, place: str) -> Row:
    """The second answer, and what is wanted: of two answers the first, unless the record says."""
    other = _text(row.get("other") or "", "other", place, empty=True)
    loss = row.get("loss") or ("good-v-bad" if other else "good")
    if loss not in ("good", "bad", "good-v-bad", "balance"):
        raise RecordsError(f"{place}: loss must be good, bad, good-v-bad or balance; got {loss!r}.")
    if loss in ("good-v-bad", "balance") and not other:
        raise RecordsError(f"{place}: loss {loss} weighs two answers: it needs a field 'other'.")
    return {"loss": loss, "other": with_blank(prompt, other) if other else ""}


def with_blank(prompt: str, answer: str) -> str:
    """The answer with the one blank before it that separates it from its prompt."""
    return answer.strip() if prompt[-1:].isspace() else f" {answer.strip()}"


def _pairs(value: Any, name: str, place: str) -> Iterator[Pair]:
    """Pairs of a prompt and its answer, however they are nested by kind."""
    if not value:
        return
    if isinstance(value, Mapping) and "prompt" not in value:
        for part in value.values():
            yield from _pairs(part, name, place)
        return
    for probe in [value] if isinstance(value, Mapping) else value:
        if isinstance(probe, Mapping):
            found = probe.get("prompt"), probe.get("answer", probe.get("ground_truth", ""))
        elif isinstance(probe, Sequence) and not isinstance(probe, str) and len(probe) == 2:
            found = probe[0], probe[1]
        else:
            raise RecordsError(
                f"{place}: {name} must hold pairs of a prompt and its answer; got {probe!r}."
            )
        prompt = _text(found[0], name, place)
        yield prompt, with_blank(prompt, _text(_first(found[1]), name, place))


def _first(value: Any) -> Any:
    """Of several right answers, the first."""
    while isinstance(value, list) and value:
        value = value[0]
    return value


def _text(value: Any, name: str, place: str, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise RecordsError(f"{place}: {name} must be a text that is not empty; got {value!r}.")
    return value
