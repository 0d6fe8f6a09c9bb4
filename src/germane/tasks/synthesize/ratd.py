"""RATD: training records whose context is what a retriever found, beside the plain ones."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from germane.core.answers import contains
from germane.core.chat import ChatModel
from germane.core.errors import RecordsError, SettingError
from germane.core.evidence import Step, Table
from germane.core.records import Data, Row, open_rows
from germane.method import method
from germane.retrieval import Hit, RetrieverRequest, make_index
from germane.retrieval import Passage as Entry
from germane.roles import Records, require_fields, with_places
from germane.solver import READING, RIGHT, Passage, Question, instruction, quoted, read_questions
from germane.tasks.synthesize._synthesizer import ORIGIN, Synthesizer

TRAIN, CORPUS = "train", "corpus"
GIVEN, RETRIEVED = "given", "given, with retrieved passages"
ALL, SOME, NONE = "all", "some", "none"


@method("synthesize/ratd", paper="2308.04711", code="timhartill/unseen_questions")
class RATD(Synthesizer):
    """Make training records with retrieved contexts, relevant or partly so, mixed with the plain ones.

    Hartill et al., "Answering Unseen Questions With Smaller Language Models Using Rationale Generation and
    Dense Retrieval", 2023: a small reader that is trained on retrieval-augmented training data copes with
    long contexts of which most is beside the point. Every question of the role train is asked of the role
    corpus, and the `passages` best, as many as fit into `words`, become the context of a record. Its field
    `evidence` says how much of what is needed they hold: of a question whose passages of kind right are
    known, all, some or none of these; of another, all where they hold a right answer, else none. Records
    without evidence are left out unless `irrelevant` keeps them. `share` is the part of retrieved records
    in `train.jsonl`; the rest are plain: the question with its own passages, or alone. Each question comes
    at most once in each form, and where there are too many of one form, they are drawn.

    Use it before fine-tuning a small reader that will be given retrieved passages. Not when its passages
    will be right always: contexts that are half beside the point cost it training. Keep the questions to be
    measured on, and their sources, out of both roles.

    Differs from the paper and the code: retrieval is any of germane's, BM25 by default, where the paper
    trains a multi-hop retriever of sentences. Contexts are passages in their ranks, quoted as
    ground/plain quotes them, so that the reader is later asked as it was trained. What counts as evidence
    is this package's rule; the paper's mixture also trains numeracy and span filling, which are left out.
    The model is not asked anything.
    """

    roles: ClassVar[Mapping[str, str]] = {
        TRAIN: "questions with answers",
        CORPUS: "passages with a text, and perhaps _id and title",
    }

    retriever: RetrieverRequest = Field(
        default=RetrieverRequest(name="bm25"), description="finds passages: a name, or name and settings"
    )
    passages: int = Field(default=5, gt=0, description="best passages in a context")
    words: int = Field(default=300, gt=0, description="longest context; passages beyond it are left out")
    share: float = Field(
        default=0.5, ge=0, le=1, description="of the records, those with retrieved passages"
    )
    irrelevant: bool = Field(default=False, description="keep contexts that hold nothing of what is needed")
    prompt: str = Field(default=READING, description="what is asked, with {passages} and {question}")

    @field_validator("prompt")
    @classmethod
    def _has_places(cls, value: str) -> str:
        return with_places(value, "{passages}", "{question}")

    def check_records(self, records: Records) -> None:
        """Every question has an answer, every passage a text, and the retriever's libraries are there."""
        self.retriever.build().check()
        for role, meaning in self.roles.items():
            if role not in records:
                raise SettingError(f"{self.name}: needs {meaning}: --data {role}=FILE.")
        require_fields("a passage", records[CORPUS], [records[CORPUS].text])
        for number, question in enumerate(read_questions(records[TRAIN]), 1):
            if not question.answers:
                raise RecordsError(f"{records[TRAIN].path}, record {number}: has no answer to learn.")

    def make(self, chat: ChatModel, records: Records, seed: int, step: Step) -> dict[str, list[Row]]:
        """The mixture, in `train`."""
        questions = read_questions(records[TRAIN])
        found = self._search(questions, records[CORPUS])
        retrieved = [self._retrieved(*pair) for pair in zip(questions, found, strict=True)]
        kept = [
            row for row in retrieved if row["retrieved"] and (self.irrelevant or row["evidence"] != NONE)
        ]
        plain = [self._plain(question) for question in questions]
        step.tables.append(_evidence(retrieved))
        return {TRAIN: mixed(kept, plain, self.share, random.Random(seed))}

    def _search(self, questions: Sequence[Question], corpus: Data) -> list[list[Hit]]:
        entries = (
            Entry(str(row.get("_id", row.get("id", number))), str(row.get("title") or ""), row[corpus.text])
            for number, row in enumerate(open_rows(corpus), 1)
        )
        with tempfile.TemporaryDirectory() as folder:
            index = make_index(self.retriever.build(), entries, Path(folder))
            return index.search([question.text for question in questions], self.passages)

    def _retrieved(self, question: Question, hits: Sequence[Hit]) -> Row:
        context: list[Passage] = []
        length = 0
        for hit in hits:
            length += len(f"{hit.title} {hit.text}".split())
            if length > self.words:
                break
            context.append(Passage(hit.id, hit.text, hit.title))
        row = self._row(question, context, RETRIEVED)
        return {**row, "evidence": evidence(question, context), "retrieved": [each.id for each in context]}

    def _plain(self, question: Question) -> Row:
        return self._row(question, question.passages, GIVEN)

    def _row(self, question: Question, context: Sequence[Passage], origin: str) -> Row:
        asked = instruction(question)
        if context:
            places = {"passages": quoted(context), "question": question.lettered}
            asked = re.sub(r"\{(passages|question)\}", lambda place: places[place[1]], self.prompt)
        return {"id": question.id, "prompt": asked, "answer": question.answers[0], ORIGIN: origin}


def evidence(question: Question, context: Sequence[Passage]) -> str:
    """How much of what a question needs its context holds: all, some or none."""
    needed = [_plain_text(each.text) for each in question.passages if each.kind == RIGHT]
    texts = [_plain_text(each.text) for each in context]
    if not needed:
        held = any(contains(text, answer) for text in texts for answer in question.answers)
        return ALL if held else NONE
    there = [any(each in text for text in texts) for each in needed]
    return ALL if all(there) else SOME if any(there) else NONE


def _plain_text(text: str) -> str:
    return " ".join(text.casefold().split())


def mixed(
    retrieved: Sequence[Row], plain: Sequence[Row], share: float, generator: random.Random
) -> list[Row]:
    """As many records as there are, with a share of retrieved ones, in an order that is drawn.

    Args:
        retrieved: Records with retrieved passages.
        plain: Records without.
        share: Of the former in the result.
        generator: What is drawn with.

    Raises:
        RecordsError: There are none of a kind that is wanted.
    """
    if share > 0 and not retrieved:
        raise RecordsError(
            "no context holds anything of what is needed: retrieve more passages, or keep all."
        )
    most = [len(retrieved) / share] if share > 0 else []
    most += [len(plain) / (1 - share)] if share < 1 else []
    total = min(most)
    chosen = generator.sample(list(retrieved), round(total * share))
    chosen += generator.sample(list(plain), round(total * (1 - share)))
    return generator.sample(chosen, len(chosen))


def _evidence(rows: Sequence[Row]) -> Table:
    """How many retrieved contexts hold what is needed."""
    counts: list[list[str | float | int | None]] = [
        [word, sum(row["evidence"] == word for row in rows)] for word in (ALL, SOME, NONE)
    ]
    return Table(title="Evidence in retrieved contexts", columns=["held", "contexts"], rows=counts)
