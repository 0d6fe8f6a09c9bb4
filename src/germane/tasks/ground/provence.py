"""Provence: one pass over question and passage scores the passage, and says which sentences to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from germane.core.chat import ChatSettings
from germane.core.evidence import Step, Table
from germane.core.training import Training
from germane.embedded import model_folder
from germane.method import method
from germane.solver import (
    READING,
    Answer,
    Passage,
    Question,
    Solver,
    Solving,
    Use,
    instruction,
    quoted,
    read_answer,
)
from germane.tasks.ground._pruner import (
    Pruner,
    Read,
    Rule,
    Text,
    compression,
    kept,
    read_labelled_passages,
)
from germane.tasks.ground._two_heads import require_pruner

PRUNER = "pruner"  # the folder of the result that holds a trained one
_THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Pruned:
    """A passage after pruning.

    Attributes:
        passage: As it was.
        text: Its title and sentences.
        read: What the pruner made of it.
        keeps: Of each sentence, whether it is kept.
    """

    passage: Passage
    text: Text
    read: Read
    keeps: list[bool]

    @property
    def left(self) -> str:
        """What is left, without the title; "" if nothing is."""
        pairs = list(zip(self.text.sentences, self.keeps, strict=True))[self.text.titled :]
        return " ".join(sentence for sentence, keep in pairs if keep)

    @property
    def dropped(self) -> list[str]:
        """The sentences that are gone, with the title if it is."""
        return [
            sentence for sentence, keep in zip(self.text.sentences, self.keeps, strict=True) if not keep
        ]


@method("ground/provence", paper="2501.16214", code="naver/bergen")
class Provence(Solver):
    """Drop the sentences that do not help to answer, order the passages, and answer from what is left.

    Chirkova et al., "Provence: efficient and robust context pruning for retrieval-augmented generation",
    ICLR 2025. An encoder reads [CLS] question [SEP] passage [SEP] once. A head on the first token gives
    the passage's score, a head on every token t the probability p_t that it is to be kept. A sentence is
    kept if more than half of its tokens have p_t > T = `threshold` (`rule` "majority"), or if the mean of
    p_t is above T ("mean"). A title is kept if and only if a sentence is. Passages are shown in the order
    of their scores, the `most` best of those of which something is left; where nothing is left, the
    question is asked alone. Compression is 100 * (characters before - characters after) / characters
    before, over all passages of a question, also those that `most` leaves out.

    `pruner` is naver/provence-reranker-debertav3-v1 (of 430 million parameters, English; its licence, CC
    BY-NC 4.0, excludes commercial use), or a folder that was trained here. With `labelled`, records of
    synthesize/provence, it is trained first, beginning with `pruner`: any cross-encoder, whose score it
    keeps, or any encoder. The loss is cross-entropy of the tokens + `rank_weight` times the squared
    distance of the score from the teacher's. What was trained is left in the result, folder `pruner`, and
    may be named as `pruner` next time, or as the model of retrieve/rerank.

    Use it when passages are long, and few of their sentences matter: the chat model reads less, and is
    distracted less, for one pass of a small model that a reranker would need anyway. Not when the answer
    rests on the whole of a passage, nor in a language that the pruner was not trained on.

    Differs from the paper and the code: sentences are split by rules of punctuation instead of nltk's
    model, the same here as in synthesize/provence, and joined by a blank. Tokens of the question, special
    tokens and padding are left out of the loss, where the code counts them as dropped, so that padding
    dilutes it; `every_token` does so too. The code weights the score's part with 1; 0.05 is what the
    paper is reported to have. Passages that are longer than `window` are read in several windows that
    end with sentences, and the best one's score counts, where the code cuts the passage; from such a
    passage no score is learned. Only a title that the passage has apart is a title, where the code takes
    the first sentence for one. The code that comes with the published model was not at hand: of its rule
    some say that it is "mean", some that the share of tokens above T has to be above T itself, not a half.
    Ports of it give the model questions in small letters without punctuation, and so does this; a pruner
    trained here reads them as they are. XProvence, on XLM-RoBERTa, cannot be opened.
    """

    pruner: str = Field(
        description="the pruner: a folder or hub id, such as naver/provence-reranker-debertav3-v1; with "
        "labelled, the cross-encoder or encoder to begin with"
    )
    labelled: str = Field(
        default="", description="a file of records of synthesize/provence to train the pruner on first"
    )
    threshold: float = Field(default=0.1, ge=0, lt=1, description="T; 0.5 drops more")
    rule: Rule = Field(
        default="majority",
        description="keep a sentence if most of its tokens are above T, or if their mean is",
    )
    most: int = Field(default=0, ge=0, description="best passages to keep; 0 keeps all")
    window: int = Field(
        default=512, ge=32, description="most tokens of question and passage that are read at a time"
    )
    max_tokens: int = Field(default=64, gt=0, description="longest answer, in tokens")
    rank_weight: float = Field(
        default=0.05, ge=0, description="of the score's part of the loss; 0 trains the pruning alone"
    )
    every_token: bool = Field(
        default=False, description="count tokens outside the passage, and padding, as dropped in the loss"
    )
    learning_rate: float = Field(default=3e-6, gt=0, description="of the pruner's optimiser, Adam")
    epochs: int = Field(default=1, ge=1, description="times the labelled records are gone through")
    batch_size: int = Field(default=48, gt=0, description="labelled passages of a step")

    def check_questions(self, questions: Sequence[Question], demonstrations: Sequence[Question]) -> None:
        """The pruner is there, and can prune, or there are labelled records to learn it from."""
        if self.labelled:
            model_folder(self.pruner)
            read_labelled_passages(self.labelled, scored=self.rank_weight > 0)
        else:
            require_pruner(self.pruner)

    def solve(self, solving: Solving, questions: Sequence[Question]) -> list[Answer]:
        found = self.prune(self._pruner(solving), questions)
        shown = [self._shown(each) for each in found]
        prompts = [_prompt(question, each) for question, each in zip(questions, shown, strict=True)]
        replies = solving.ask(questions, prompts, "answer", ChatSettings(max_tokens=self.max_tokens))
        self._note(solving.step, found)
        return [
            Answer(
                read_answer(reply, question), reply, tuple(_use(each, best) for each in pruned),
                _details(pruned, best),
            )
            for question, pruned, best, reply in zip(questions, found, shown, replies, strict=True)
        ]  # fmt: skip

    def prune(self, pruner: Pruner, questions: Sequence[Question]) -> list[list[Pruned]]:
        """Every passage of every question after pruning, in the questions' order of them."""
        texts = [[Text.of(passage) for passage in question.passages] for question in questions]
        pairs = [
            (question.lettered, text)
            for question, own in zip(questions, texts, strict=True)
            for text in own
        ]
        reads = iter(pruner(pairs))
        return [
            [
                Pruned(passage, text, read, kept(read, self.threshold, self.rule, text.titled))
                for passage, text, read in zip(question.passages, own, reads)  # noqa: B905
            ]
            for question, own in zip(questions, texts, strict=True)
        ]

    def _pruner(self, solving: Solving) -> Pruner:
        """The pruner; one that was trained for other questions of this run is not trained again."""
        if not self.labelled:
            return Pruner(self.pruner, self.window)
        folder = solving.folder / PRUNER if solving.folder is not None else None
        if folder is not None and folder.is_dir():
            return Pruner(str(folder), self.window)
        pruner = Pruner(self.pruner, self.window, trained=True)
        training = Training(
            learning_rate=self.learning_rate, epochs=self.epochs, batch_size=self.batch_size
        )
        rows = read_labelled_passages(self.labelled, scored=self.rank_weight > 0)
        pruner.train(rows, training, self.rank_weight, self.every_token, solving.seed)
        if folder is not None:
            pruner.save(folder)
        return pruner

    def _shown(self, pruned: Sequence[Pruned]) -> list[Pruned]:
        """Passages of which something is left, the best first."""
        left = sorted((each for each in pruned if each.left), key=lambda each: -each.read.score)
        return left[: self.most] if self.most else left

    def _note(self, step: Step, found: Sequence[Sequence[Pruned]]) -> None:
        """How much was dropped, and how much other thresholds would drop."""
        values = [_compression(pruned) for pruned in found]
        step.facts.setdefault("compression of the passages, percent", []).append(
            round(sum(values) / max(len(values), 1), 1)
        )
        step.tables.append(
            Table(
                title="What other thresholds keep",
                columns=["threshold", "sentences kept, %", "compression, %"],
                rows=[list(self._at(threshold, found)) for threshold in _THRESHOLDS],
            )
        )  # fmt: skip

    def _at(self, threshold: float, found: Sequence[Sequence[Pruned]]) -> tuple[float, float, float]:
        again = [
            [
                Pruned(each.passage, each.text, each.read,
                       kept(each.read, threshold, self.rule, each.text.titled))
                for each in pruned
            ]
            for pruned in found
        ]  # fmt: skip
        keeps = [keep for pruned in again for each in pruned for keep in each.keeps]
        values = [_compression(pruned) for pruned in again]
        share = 100 * sum(keeps) / max(len(keeps), 1)
        return threshold, round(share, 1), round(sum(values) / max(len(values), 1), 1)


def _prompt(question: Question, shown: Sequence[Pruned]) -> str:
    if not shown:
        return instruction(question)
    passages = [Passage(each.passage.id, each.left, each.passage.title) for each in shown]
    return READING.format(passages=quoted(passages), question=question.lettered)


def _compression(pruned: Sequence[Pruned]) -> float:
    """Percent of the characters of a question's passages that are gone."""
    whole = [" ".join(each.text.sentences) for each in pruned]
    titles = [each.passage.title.strip() for each in pruned]
    left = [
        f"{title} {each.left}".strip() if each.left else ""
        for title, each in zip(titles, pruned, strict=True)
    ]
    return compression(whole, left)


def _use(pruned: Pruned, shown: Sequence[Pruned]) -> Use:
    is_shown = any(each is pruned for each in shown)
    sentences = len(pruned.text.sentences) - pruned.text.titled
    keeps = sum(pruned.keeps[pruned.text.titled :])
    reason = f"scores {pruned.read.score:.2f}; {keeps} of {sentences} sentences kept"
    if not is_shown:
        reason += "; other passages score better" if pruned.left else ", so it is left out"
    return Use(pruned.passage.id, is_shown, reason, pruned.left if is_shown else "")


def _details(pruned: Sequence[Pruned], shown: Sequence[Pruned]) -> dict[str, Any]:
    return {
        "shown": [each.passage.id for each in shown],  # in the order of their numbers
        "scores": {each.passage.id: each.read.score for each in pruned},
        "dropped": {each.passage.id: each.dropped for each in pruned if each.dropped},
        "compression": _compression(pruned),
    }
