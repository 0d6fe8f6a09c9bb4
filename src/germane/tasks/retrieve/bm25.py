"""BM25: words that query and passage share, the rare ones counting more."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from germane.core.errors import RecordsError
from germane.core.progress import track
from germane.method import method
from germane.retrieval import Opened, Passage, Passages, Ranking, Retriever

_WORD = re.compile(r"\b\w\w+\b")
_VIEWS: dict[str, Callable[[Passage], str]] = {
    "whole": lambda passage: passage.whole,
    "text": lambda passage: passage.text,
    "title": lambda passage: passage.title,
}


@method("retrieve/bm25", paper="2306.07471", code="castorini/pyserini")
class BM25(Retriever):
    """Rank by words that query and passage share, the rare ones counting more.

    Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", Foundations and
    Trends in Information Retrieval 2009, with the parameters of Kamalloo et al., "Resources for Brewing
    BEIR: Reproducible Reference Models and an Official Leaderboard", SIGIR 2024; computed by bm25s (Lù,
    "BM25S: Orders of magnitude faster lexical search via eager sparse scoring", 2024). A passage's score
    is the sum over the query's words of

        log(1 + (N - n + 1/2) / (n + 1/2)) · f / (f + k1 · (1 - b + b · l / L)),

    N passages, n of them with the word, which is f times in this one of l words, L on average. With
    `fields` multifield, titles and texts are indexed apart and the two scores are added; flat joins
    them first. Passages that share no word with the query are not ranked.

    Use it when queries name what they look for, as a first stage, and as the baseline of anything else:
    it needs no model. Not when queries and passages use different words, or different languages.

    Differs from the paper's reference: Lucene keeps a passage's length in one byte, and takes single
    letters as words; here lengths are exact and words have two letters or more. Stop words are Lucene's
    33, stems are Porter's, as there. The index is made in memory (12 bytes for each different word
    of each passage) and mapped when opened.
    """

    libraries: ClassVar[dict[str, str]] = {"bm25s": "bm25s", "nltk": "nltk"}

    k1: float = Field(default=0.9, ge=0, description="how much repeated words count")
    b: float = Field(default=0.4, ge=0, le=1, description="how much long passages are held back")
    fields: Literal["multifield", "flat"] = Field(
        default="multifield", description="title and text scored apart and added, or as one text"
    )
    stem: bool = Field(default=True, description="reduce English words to their stems (Porter)")
    stop_words: bool = Field(default=False, description="keep English stop words, such as the")

    def index(self, passages: Passages, folder: Path) -> None:
        import bm25s
        from bm25s.tokenization import Tokenized

        views = ("text", "title") if self.fields == "multifield" else ("whole",)
        for name in views:
            tokens = _Tokens.write(passages, _VIEWS[name], self.words, folder / f"{name}.tokens")
            if tokens.vocabulary:
                retriever = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
                retriever.index(Tokenized(tokens, tokens.vocabulary), show_progress=False)
                retriever.save(folder / name, show_progress=False)
            tokens.file.unlink()
        if not any((folder / name).is_dir() for name in views):
            raise RecordsError(f"{self.name}: no passage holds a word.")

    def open(self, passages: Passages, folder: Path) -> Opened:
        import bm25s

        try:
            found = [
                bm25s.BM25.load(place, mmap=True, show_progress=False)
                for place in sorted(folder.iterdir())
                if place.is_dir()
            ]
        except (OSError, ValueError) as error:
            raise RecordsError(f"{folder}: cannot be read: {error}; make the index again.") from None
        return Opened(_Search(passages, found, self.words))

    def words(self, text: str) -> list[str]:
        """The words of a text that count."""
        found = _WORD.findall(text.lower())
        if not self.stop_words:
            kept = _stop_words()
            found = [word for word in found if word not in kept]
        return [_stem(word) for word in found] if self.stem else found


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer(mode="ORIGINAL_ALGORITHM")


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    return _stemmer().stem(word, to_lowercase=False)


@dataclass(frozen=True)
class _Tokens:
    """The words of every passage as numbers, on disk: bm25s goes over them three times.

    Attributes:
        file: The numbers of all passages, one after the other.
        ends: Where each passage's end.
        vocabulary: Word -> number.
    """

    file: Path
    ends: NDArray[np.int64]
    vocabulary: dict[str, int]

    @classmethod
    def write(
        cls,
        passages: Passages,
        view: Callable[[Passage], str],
        words: Callable[[str], list[str]],
        file: Path,
    ) -> _Tokens:
        vocabulary: dict[str, int] = {}
        lengths = array("q")
        with file.open("wb") as out:
            for passage in track(passages, "indexing words", len(passages)):
                numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in words(view(passage))]
                array("i", numbers).tofile(out)
                lengths.append(len(numbers))
        return cls(file, np.cumsum(np.frombuffer(lengths, np.int64)), vocabulary)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        with self.file.open("rb") as numbers:
            for end in self.ends:
                held = array("i")
                held.fromfile(numbers, int(end) - start)
                start = int(end)
                yield held.tolist()


@dataclass(frozen=True)
class _Search:
    passages: Passages
    fields: list[Any]
    words: Callable[[str], list[str]]

    def __call__(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        return [self._one(self.words(query), depth) for query in queries]

    def _one(self, words: list[str], depth: int) -> Ranking:
        total = np.zeros(len(self.passages), np.float32)
        for field in self.fields:
            known = field.get_tokens_ids(words)
            if known:
                total += field.get_scores_from_ids(known)
        positions = np.flatnonzero(total)  # what shares no word is no result
        return self.passages.best(total[positions], depth, positions)
