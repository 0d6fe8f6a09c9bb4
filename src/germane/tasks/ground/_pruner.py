"""A cross-encoder with a second head: one pass gives a passage's score and what of it to keep."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from germane.core.device import device
from germane.core.errors import CheckpointError, RecordsError
from germane.core.progress import track
from germane.core.records import Data, Row, open_rows
from germane.core.sentences import split_sentences
from germane.core.training import History, Training, fit
from germane.embedded import model_folder
from germane.solver import Passage
from germane.tasks.ground._two_heads import (
    IGNORED,
    is_published,
    load,
    load_tokenizer,
    losses,
    require_pruner,
)

Rule = Literal["majority", "mean"]
_TOKENS_AT_A_TIME = 16384


@dataclass(frozen=True)
class Text:
    """A passage as it is read: its title, if it has one, then its sentences."""

    sentences: tuple[str, ...]
    titled: bool = False

    @classmethod
    def of(cls, passage: Passage) -> Text:
        """The sentences of a passage."""
        found = [passage.text[start:end] for start, end in split_sentences(passage.text)]
        title = passage.title.strip()
        return cls((title, *found) if title else tuple(found), bool(title))


@dataclass(frozen=True)
class Read:
    """What a pruner makes of a passage.

    Attributes:
        score: How relevant it is, without bounds; of a passage in several windows, the best one's.
        probabilities: Of each sentence, for each of its tokens, the probability that it is to be kept.
    """

    score: float
    probabilities: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Labelled:
    """A passage with what of it answers the question.

    Attributes:
        question: The question.
        text: The passage.
        cited: Places of the sentences to keep.
        score: The teacher's, without bounds; NaN if there is none.
    """

    question: str
    text: Text
    cited: frozenset[int]
    score: float


@dataclass(frozen=True)
class Window:
    """What is read at a time: a question, and as many sentences as there is room for.

    Attributes:
        pair: Number of the pair it is of.
        tokens: Their numbers, special ones included.
        types: Of each token, whether it belongs to the first text or the second.
        owners: Of each token, the place of the sentence it is of; -1 of the question and special tokens.
        whole: Whether the whole passage is in it.
    """

    pair: int
    tokens: list[int]
    types: list[int]
    owners: list[int]
    whole: bool


def kept(read: Read, threshold: float, rule: Rule, titled: bool) -> list[bool]:
    """Of each sentence, whether it is kept.

    Args:
        read: What the pruner made of the passage.
        threshold: T, between 0 and 1.
        rule: "majority": more than half of the sentence's tokens have p > T; "mean": the mean of p is > T.
        titled: Whether the first sentence is a title, which is kept if and only if another one is.
    """
    found = [_keeps(each, threshold, rule) for each in read.probabilities]
    return [any(found[1:]), *found[1:]] if titled and found else found


def _keeps(probabilities: Sequence[float], threshold: float, rule: Rule) -> bool:
    if not probabilities:
        return False
    if rule == "mean":
        return math.fsum(probabilities) / len(probabilities) > threshold
    return sum(each > threshold for each in probabilities) / len(probabilities) > 0.5


def compression(original: Sequence[str], left: Sequence[str]) -> float:
    """Percent of the characters that are gone; 0 where there were none."""
    whole = sum(map(len, original))
    return 100 * (whole - sum(map(len, left))) / whole if whole else 0.0


class Pruner:
    """Questions and passages to scores and probabilities.

    Args:
        name: minilm, a folder, or a hub id.
        window: Tokens of question and passage that are read at a time, at most; the model may read fewer.
        trained: Whether `train` comes next: heads that are not there are then made new.

    Raises:
        CheckpointError: No such model, or one without a token head that is not trained next.
    """

    def __init__(self, name: str, window: int = 512, trained: bool = False) -> None:
        folder = model_folder(name)
        if not trained:
            require_pruner(name)
        # Ports of the code that comes with the published checkpoint agree that it is given questions so.
        self._plain = is_published(folder) and not trained
        self._model = load(folder).to(device()).eval()
        self._tokenizer = load_tokenizer(folder)
        self._frame = self._pair()
        self._window = min(window, self._longest())

    def _longest(self) -> int:
        """Most tokens that the model reads."""
        config = self._model.ranker.config
        positions = getattr(config, "max_position_embeddings", None) or self._tokenizer.model_max_length
        if "roberta" in config.model_type:
            positions -= config.pad_token_id + 1  # its positions begin after that of padding
        return int(min(positions, self._tokenizer.model_max_length))

    def _pair(self) -> list[list[tuple[int, int]]]:
        """Tokens and their types of a pair of texts: before, the first, between, the second, after."""
        pair = self._tokenizer("a", "a")
        sides, tokens = pair.sequence_ids(0), pair["input_ids"]
        both = list(zip(tokens, pair.get("token_type_ids") or [0] * len(tokens), strict=True))
        ends = [len(sides) - sides[::-1].index(side) for side in (0, 1)]
        cuts = [0, sides.index(0), ends[0], sides.index(1), ends[1], len(sides)]
        return [both[start:end] for start, end in pairwise(cuts)]

    def __call__(self, pairs: Sequence[tuple[str, Text]]) -> list[Read]:
        """What is found in each passage for its question, in their order; all pairs at once."""
        windows = self._windows(pairs)
        scores = [-math.inf] * len(pairs)
        found: list[list[list[float]]] = [[[] for _ in text.sentences] for _, text in pairs]
        order = sorted(range(len(windows)), key=lambda place: len(windows[place].tokens))
        batches = list(_batches([windows[place] for place in order]))
        for batch in track(batches, "pruning", len(batches)):
            for window, score, probabilities in zip(batch, *self._read(batch), strict=True):
                scores[window.pair] = max(scores[window.pair], score)
                for owner, probability in zip(window.owners, probabilities, strict=False):
                    if owner >= 0:
                        found[window.pair][owner].append(probability)
        return [
            Read(score, tuple(map(tuple, sentences)))
            for score, sentences in zip(scores, found, strict=True)
        ]

    @torch.no_grad()
    def _read(self, windows: Sequence[Window]) -> tuple[list[float], list[list[float]]]:
        scores, logits = self._model(**self._batch(windows))
        if not scores.isfinite().all():
            raise CheckpointError("the pruner gives numbers that are not finite; its weights are damaged.")
        return scores.tolist(), logits.softmax(dim=-1)[..., 1].tolist()

    def _windows(self, pairs: Sequence[tuple[str, Text]]) -> list[Window]:
        """Every pair as one window, or as several that end with sentences.

        Only a sentence that is longer than a window is divided; no token is left out.
        """
        questions = self._tokens([self._question(question) for question, _ in pairs])
        sentences = iter(
            self._tokens([
                f" {sentence}" if place else sentence
                for _, text in pairs for place, sentence in enumerate(text.sentences)
            ])
        )  # fmt: skip
        windows = []
        for number, ((asked, text), question) in enumerate(zip(pairs, questions, strict=True)):
            room = self._window - len(question) - sum(map(len, self._frame[::2]))
            if room < self._window // 4:
                raise RecordsError(
                    f"question {asked[:60]!r} has {len(question)} tokens; the pruner reads {self._window} "
                    "at a time and needs a quarter of them for the passage."
                )
            parts = _fill([next(sentences) for _ in text.sentences], room)
            for tokens, owners in parts:
                windows.append(self._framed(number, question, tokens, owners, len(parts) == 1))
        return windows

    def _question(self, text: str) -> str:
        if not self._plain:
            return text
        bare = text.lower().translate(str.maketrans("", "", string.punctuation))
        return " ".join(bare.split()) or text

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False,
            split_special_tokens=True,  # "[SEP]" in a text of someone else is text
        )["input_ids"]  # fmt: skip
        return found

    def _framed(
        self, pair: int, question: list[int], passage: list[int], owners: list[int], whole: bool
    ) -> Window:
        before, asked, between, read, after = self._frame
        both = [
            *before, *((token, asked[0][1]) for token in question),
            *between, *((token, read[0][1]) for token in passage), *after,
        ]  # fmt: skip
        start = len(before) + len(question) + len(between)
        everyone = [-1] * start + owners + [-1] * len(after)
        return Window(pair, [token for token, _ in both], [kind for _, kind in both], everyone, whole)

    def _batch(self, windows: Sequence[Window], length: int = 0) -> dict[str, Tensor]:
        """What the model reads: windows padded on the right to the longest, or to `length`."""
        length = max(length, *(len(window.tokens) for window in windows))
        names = {"input_ids": "tokens", "token_type_ids": "types"}
        fill = {"input_ids": self._tokenizer.pad_token_id or 0, "token_type_ids": 0}
        batch = {
            name: torch.tensor([_padded(getattr(each, source), length, fill[name]) for each in windows])
            for name, source in names.items()
            if name in self._tokenizer.model_input_names
        }
        masks = [_padded([1] * len(each.tokens), length, 0) for each in windows]
        batch["attention_mask"] = torch.tensor(masks)
        return {name: values.to(device()) for name, values in batch.items()}

    def train(
        self, rows: Sequence[Labelled], settings: Training, weight: float, every_token: bool, seed: int
    ) -> History:
        """Learn from labelled passages: cross-entropy of the tokens + weight * squared error of the score.

        Args:
            rows: What to learn from.
            settings: Of the training.
            weight: Of the score's part; of a passage in several windows, no score is learned.
            every_token: Count the question's tokens, special ones and padding up to the window as dropped.
            seed: Of the order and of dropout.
        """
        windows = self._windows([(row.question, row.text) for row in rows])
        length = self._window if every_token else 0
        other = 0 if every_token else IGNORED

        def batches(epoch: int) -> Iterator[list[Window]]:
            order = random.Random(f"{seed}/{epoch}").sample(windows, len(windows))
            for start in range(0, len(order), settings.batch_size):
                yield order[start : start + settings.batch_size]

        def loss(batch: list[Window]) -> Tensor:
            given = self._batch(batch, length)
            width = given["input_ids"].shape[1]
            labels = [
                [other if owner < 0 else int(owner in rows[each.pair].cited) for owner in each.owners]
                for each in batch
            ]
            targets = [rows[each.pair].score if each.whole else math.nan for each in batch]
            scores, logits = self._model(**given)
            pruning, ranking = losses(
                scores,
                logits,
                torch.tensor([_padded(each, width, other) for each in labels], device=device()),
                torch.tensor(targets, device=device()),
            )
            return pruning + weight * ranking if weight else pruning

        self._model.requires_grad_(True).train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            steps = -(-len(windows) // settings.batch_size)
            history = fit(self._model, settings, batches, steps, loss, label="training the pruner")
        self._model.eval()
        return history

    def save(self, folder: Path) -> None:
        """Write a folder that opens as a pruner, and as a cross-encoder where only the score is wanted."""
        self._model.save(folder)
        self._tokenizer.save_pretrained(folder)


def _padded(values: Sequence[int], length: int, fill: int) -> list[int]:
    return [*values, *[fill] * (length - len(values))]


def _fill(sentences: Sequence[list[int]], room: int) -> list[tuple[list[int], list[int]]]:
    """Sentences in as few windows as there is need for, each with the place of its tokens' sentences."""
    parts: list[tuple[list[int], list[int]]] = [([], [])]
    for place, sentence in enumerate(sentences):
        if parts[-1][0] and len(parts[-1][0]) + len(sentence) > room:
            parts.append(([], []))
        for start in range(0, len(sentence), room):
            piece = sentence[start : start + room]
            if len(parts[-1][0]) + len(piece) > room:
                parts.append(([], []))
            parts[-1][0].extend(piece)
            parts[-1][1].extend([place] * len(piece))
    return parts


def _batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows in their order, from the shortest, so many at a time that memory is enough."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window.tokens) > _TOKENS_AT_A_TIME:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


# --- Records


def read_labelled_passages(path: str, scored: bool) -> list[Labelled]:
    """Passages to train a pruner on: `question`, `sentences`, `cited`, and perhaps `title` and `score`.

    Args:
        path: The file.
        scored: Whether every record must have a score.

    Raises:
        RecordsError: A field is missing, or of the wrong kind.
    """
    rows = open_rows(Data(name="labelled", path=path))
    return [_labelled(row, f"{path}, record {number}", scored) for number, row in enumerate(rows, 1)]


def _labelled(row: Row, place: str, scored: bool) -> Labelled:
    question, sentences, score = row.get("question"), row.get("sentences"), row.get("score")
    if not isinstance(question, str) or not question.strip():
        raise RecordsError(f"{place}: has no text in field 'question'. Fields: {', '.join(row)}.")
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) for s in sentences):
        raise RecordsError(f"{place}: 'sentences' must be a list of texts. Fields: {', '.join(row)}.")
    title = str(row.get("title") or "").strip()
    parts = (title, *sentences) if title else tuple(sentences)
    cited = row.get("cited")
    if not isinstance(cited, list) or not all(type(n) is int and 0 <= n < len(parts) for n in cited):
        raise RecordsError(
            f"{place}: 'cited' must be a list of numbers from 0 to {len(parts) - 1}: of the title, where "
            "there is one, and of the sentences."
        )
    if score is None and not scored:
        score = math.nan
    elif not isinstance(score, int | float) or not math.isfinite(score):
        raise RecordsError(
            f"{place}: 'score' must be a number, the teacher's; without a teacher, set rank_weight to 0."
        )
    return Labelled(question, Text(parts, bool(title)), frozenset(cited), float(score))
