"""Amar: entities, relations and subgraphs as soft tokens, each as loud as it is relevant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from germane.core.chat import ChatModel, encode_conversation
from germane.core.chat_cache import CachedChat
from germane.core.embedding import Encoder
from germane.core.errors import RecordsError, SettingError
from germane.core.local_chat import LocalChat
from germane.core.records import Data
from germane.core.training import Training
from germane.embedded import MINILM, model_folder
from germane.method import method
from germane.solver import Answer, Question, Solver, Solving, Use, instruction, read_answer, read_questions
from germane.tasks.ground._aspects import ASPECTS, encode
from germane.tasks.ground._prefixed import (
    ADAPTER,
    Example,
    Reader,
    ReaderSettings,
    Written,
    read_header,
    reading,
    require_peft,
)
from germane.tasks.ground._triples import Answering, QueryError, Triples, parse

ENTITIES, RELATIONS, SUBGRAPHS = ASPECTS
EXPRESSION = "expression"
ASK = "{question}\n\nWrite the query that finds the answer, as an S-expression."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@method(
    "ground/amar",
    paper="2412.18537",
    code="Applied-Machine-Learning-Lab/AMAR",
    needs=("language model",),
)
class Amar(Solver, ReaderSettings):
    """Read retrieved entities, relations and subgraphs as soft tokens, each gated by its relevance.

    Xu et al., "Harnessing Large Language Models for Knowledge Graph Question Answering via Adaptive
    Multi-Aspect Retrieval-Augmentation", AAAI 2025. Of each aspect the first k = `items` texts are read,
    from the beginning again where there are fewer. A text is the mean of its tokens' embeddings in the
    language model; an MLP for each aspect maps the means to E, R and S, each (k, width). Aligned they are

        E' = attend(E, E), R' = attend(R, R), S' = attend(E, S) + attend(R, S),

    with 4 heads. With Q the embeddings of the question's tokens, the gate of an item x of X' is

        g = sigmoid(mean over q in Q of f_X(x) · f_X(h(q))),

    h and f_X MLPs, and gx is its soft token. Learned vectors and these stand before the prompt. With
    `labelled`, solved questions with the same fields, all of it and LoRA on the feed-forward parts learn
    the answer's tokens; the rest of the language model is frozen, and afterwards it is as it was. What was
    learned is kept in the result, folder `adapter`, and read again with the setting of that name.

    Questions have the lists of texts `entities`, `relations` and `subgraphs`, the last or else their
    passages; with passages alone these stand for all three. With `triples`, a file of facts (subject,
    relation, object), the model writes S-expressions, learned from the field `expression` of the
    labelled questions, with names in square brackets. The first beam that finds something in the
    facts is the answer; failing all, each name is replaced by known ones like it.

    The details of an answer have every gate. Those of the third aspect belong to a pair of an entity and a
    relation, whose row of S' it is; the share of a subgraph's text is how much the pairs look at it,
    weighted by their gates.

    As in the code, attention has no residual connection, so that with small embeddings items may come out
    nearly alike. Trained on a tiny language model that knows invented people, it learned single questions
    by heart, but not to answer new ones, in three set-ups; look at the gates before you trust them.

    Use it when a knowledge graph gives many short texts of which few are right, there are solved
    questions to learn from, and the model's weights are at hand. Not when there are none, or the wording of
    a text matters: a mean of embeddings keeps no order of words.

    Differs from the paper and the code: padding does not count in the means (`masked_mean` off counts it,
    as the code does), and one mark of the beginning is put before a text, where the code puts two. Gates
    are in float32 whatever the model is in. The learned vectors begin as spread out as the model's
    embeddings, in the code with variance 1. Relations too are replaced for all beams only after all
    beams failed as they are, as in the code; the cosine is of any encoder, and 300 queries are tried for a
    beam, where the code tries up to 4,000 for WebQSP. The paper's ELQ, FACC1 and BM25 retrieval comes
    before this method, and facts lie in memory instead of a Freebase server. Numbers of items, soft tokens,
    beams and epochs are the paper's for CWQ; for WebQSP it has 100, 7, 15 and 80.
    """

    labelled: str = Field(default="", description="a file of solved questions to learn from")
    adapter: str = Field(
        default="", description="folder of what was learned before, whose settings then count, instead"
    )
    triples: str = Field(default="", description="a file of facts; the model then writes queries on them")
    encoder: str = Field(default=MINILM, description="says which names are alike, with triples")
    alternatives: int = Field(default=15, gt=0, description="known names tried in the place of one")
    queries: int = Field(default=300, gt=0, description="queries with other names tried for one beam")
    beams: int = Field(default=8, gt=0, description="answers that are followed; 1 is greedy")
    max_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")
    learning_rate: float = Field(default=5e-5, gt=0, description="of the optimiser, falling as a cosine")
    epochs: int = Field(default=8, ge=1, description="times the labelled questions are gone through")
    batch_size: int = Field(default=4, gt=0, description="questions that are in memory together")
    accumulate: int = Field(default=4, gt=0, description="batches whose gradients make one step")

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """Aspects are there, and something to learn from or learned before."""
        if bool(self.labelled) == bool(self.adapter):
            raise SettingError(
                f"{self.name}: needs either labelled, solved questions to learn from, or adapter, a folder "
                "of what was learned before."
            )
        require_peft(self._reader_settings())
        for question in questions:
            aspects(question)
        if self.labelled:
            self._read_labelled()
        if self.triples:
            Triples.read(self.triples)
            model_folder(self.encoder)

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        chat = local(solving.chat, self.name)
        kept = solving.folder / ADAPTER if solving.folder is not None else None
        with reading(chat, self._reader_settings(), solving.seed) as reader:
            asked = [self._example(reader, question) for question in questions]
            reader.require_context(asked, self.max_tokens)
            if self.adapter:
                reader.load(Path(self.adapter))
            elif kept is not None and kept.exists():  # questions of this run were answered before
                reader.load(kept)
            else:
                self._learn(reader, solving.seed)
                if kept is not None:
                    reader.save(kept)
            found = reader.write(asked, self.max_tokens, self.beams)
        for question, each in zip(questions, found, strict=True):
            solving.note(question, "answer", self._messages(question), each.reply)
        return self._answers(questions, found)

    def _reader_settings(self) -> ReaderSettings:
        if self.adapter:
            header = read_header(Path(self.adapter))
            return ReaderSettings(**header.model_dump(include=set(ReaderSettings.model_fields)))
        return ReaderSettings(**self.model_dump(include=set(ReaderSettings.model_fields)))

    def _read_labelled(self) -> list[Question]:
        found = read_questions(Data(name="labelled", path=self.labelled))
        for number, question in enumerate(found, 1):
            place = f"{self.labelled}, record {number}"
            aspects(question)
            if not question.answers:
                raise RecordsError(f"{place}: has no answer to learn.")
            if self.triples:
                try:
                    parse(str(question.more.get(EXPRESSION, "")))
                except QueryError as error:
                    raise RecordsError(f"{place}: {EXPRESSION!r} is no query: it {error}.") from None
        return found

    def _learn(self, reader: Reader, seed: int) -> None:
        training = Training(
            learning_rate=self.learning_rate, epochs=self.epochs, batch_size=self.batch_size,
            accumulate=self.accumulate, schedule="cosine",
        )  # fmt: skip
        examples = [self._example(reader, each, self._target(each)) for each in self._read_labelled()]
        reader.require_context(examples, 0)
        reader.learn(examples, training, seed)

    def _example(self, reader: Reader, question: Question, answer: str = "") -> Example:
        tokenizer = reader.chat.tokenizer
        texts = encode(tokenizer, question.text, aspects(question), reader.settings)
        prompt = encode_conversation(tokenizer, self._messages(question))
        target = list(tokenizer(answer, add_special_tokens=False)["input_ids"]) if answer else []
        end = [tokenizer.eos_token_id] if answer and tokenizer.eos_token_id is not None else []
        return Example(texts, prompt, target + end)

    def _messages(self, question: Question) -> list[dict[str, str]]:
        content = ASK.format(question=question.lettered) if self.triples else instruction(question)
        return [{"role": "user", "content": content}]

    def _target(self, question: Question) -> str:
        """What is to be learned: the query, the letter of the right option, or the answer."""
        if self.triples:
            return str(question.more[EXPRESSION])
        if question.options:
            return _LETTERS[question.options.index(question.answers[0])]
        return question.answers[0]

    def _answers(self, questions: Sequence[Question], found: Sequence[Written]) -> list[Answer]:
        answering = self._answering() if self.triples else None
        answers = []
        for question, each in zip(questions, found, strict=True):
            details, uses = _explained(question, each)
            text = read_answer(each.reply.text, question)
            if answering is not None:
                details["query"], results = answering.first(each.texts)
                text = ", ".join(sorted(results))
            answers.append(Answer(text, each.reply.text, uses, {**details, "beams": each.texts}))
        return answers

    def _answering(self) -> Answering:
        encoder = Encoder(model_folder(self.encoder))
        return Answering(Triples.read(self.triples), encoder, self.alternatives, self.queries)


def local(chat: ChatModel, name: str) -> LocalChat:
    """The model in this process behind `chat`.

    Raises:
        SettingError: It is behind a server, where nothing but text reaches it.
    """
    inner = chat.chat if isinstance(chat, CachedChat) else chat
    if not isinstance(inner, LocalChat):
        raise SettingError(
            f"{name}: reads soft tokens, so it needs the weights of a model in this process, a folder or a "
            f"hub id; {inner.name} is behind a server."
        )
    return inner


def aspects(question: Question) -> list[list[str]]:
    """Entities, relations and subgraphs of a question; its passages stand for what may be left out.

    Raises:
        RecordsError: There are not all three, or one is no list of texts.
    """
    found = {name: _texts(question, name) for name in ASPECTS}
    found[SUBGRAPHS] = found[SUBGRAPHS] or [
        f"{each.title}: {each.text}" if each.title else each.text for each in question.passages
    ]
    if not found[ENTITIES] and not found[RELATIONS]:
        found = dict.fromkeys(ASPECTS, found[SUBGRAPHS])
    for name, texts in found.items():
        if not texts:
            raise RecordsError(
                f"question {question.id}: has no {name}; needs lists of texts in {ENTITIES!r}, "
                f"{RELATIONS!r} and {SUBGRAPHS!r} or 'passages', or passages alone."
            )
    return [found[name] for name in ASPECTS]


def _texts(question: Question, name: str) -> list[str]:
    values = question.more.get(name) or []
    if not isinstance(values, list) or not all(isinstance(each, str) and each.strip() for each in values):
        raise RecordsError(f"question {question.id}: {name!r} must be a list of texts.")
    return values


def _explained(question: Question, found: Written) -> tuple[dict[str, Any], tuple[Use, ...]]:
    """Gates and shares by text, and what became of the passages."""
    entities, relations, subgraphs = aspects(question)
    gates = found.gates.tolist()
    weights = found.gates[2] / found.gates[2].sum()
    seen = (weights[:, None] * found.attention).sum(dim=0).tolist()
    count = len(seen)
    read = min(count, len(subgraphs))
    shares = [sum(seen[place :: len(subgraphs)]) for place in range(read)]
    details = {
        "gates": {
            ENTITIES: _rows(entities, gates[0]),
            RELATIONS: _rows(relations, gates[1]),
            "pairs": [round(gate, 4) for gate in gates[2]],
        },
        "shares": _rows(subgraphs, shares),
    }
    if question.more.get(SUBGRAPHS):
        reason = "the subgraphs of the record are read instead"
        return details, tuple(Use(each.id, False, reason) for each in question.passages)
    return details, tuple(
        Use(each.id, True, f"read as a soft token, with a share of {shares[place]:.2f}")
        if place < read
        else Use(each.id, False, f"only the first {count} are read")
        for place, each in enumerate(question.passages)
    )


def _rows(texts: Sequence[str], values: Sequence[float]) -> list[list[Any]]:
    """Each text that was read with its value."""
    return [[text, round(number, 4)] for text, number in zip(texts, values, strict=False)]
