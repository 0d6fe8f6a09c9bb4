"""Value vectors: the columns of feed-forward output matrices, and the words that they speak for.

A column is what one neuron adds to the residual stream. Its product with the output embedding, without
the final norm, says which tokens that makes likelier. Hong et al., "Intrinsic Evaluation of Unlearning
Using Parametric Knowledge Traces", 2024; Geva et al., "Transformer Feed-Forward Layers Build Predictions
by Promoting Concepts in the Vocabulary Space", 2022.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from germane.core.errors import CheckpointError
from germane.core.layers import decoder_layers, value_matrix, weight_of
from germane.core.progress import bar

TOP = 200  # tokens at the head of a projection
_CHUNK = 128  # columns that are projected at a time
# Words of at least three letters that say nothing of what a text is about.
_COMMON_WORDS = """
    about after again all also and any are because been before being between both but can could did
    does doing down during each few for from further had has have having her here him his how into
    its itself just many may more most much must nor not now off once one only other our out over
    own same several she should some such than that the their them then there these they this those
    through too two under until upon used very was well were what when where which while who whom
    whose why will with within without would you your
"""
_COMMON = frozenset(_COMMON_WORDS.split())


@dataclass(frozen=True)
class ValueVector:
    """Where a value vector is, and how well it speaks for some words.

    Attributes:
        layer: Number of the decoder layer.
        column: Number of the neuron.
        sign: 1, or -1 where the words are at the head of the negative vector's projection.
        share: Of the words, how many are among the first tokens; of at most as many as there are tokens.
    """

    layer: int
    column: int
    sign: int = 1
    share: float = 0.0


def content_words(text: str) -> list[str]:
    """The different words of a list or an article that say what it is about, in lower case."""
    words = re.findall(r"[^\W\d_]{3,}", text.lower())
    return [word for word in dict.fromkeys(words) if word not in _COMMON]


def word_tokens(tokenizer: Any, texts: Sequence[str]) -> list[dict[int, int]]:
    """Of each text, its content words as tokens: token -> number of the word.

    A word is every token that is the word but for case and surrounding spaces; a word that no single
    token is, is left out.
    """
    by_word: dict[str, list[int]] = {}
    for token in range(len(tokenizer)):
        by_word.setdefault(tokenizer.decode([token]).strip().lower(), []).append(token)
    found = []
    for text in texts:
        known = [word for word in content_words(text) if word in by_word]
        found.append({token: number for number, word in enumerate(known) for token in by_word[word]})
    return found


def output_embedding(model: Any) -> Tensor:
    """(vocabulary, width) the matrix that turns the last state into logits.

    Raises:
        CheckpointError: The model has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise CheckpointError(f"a {type(model).__name__} has no output embedding.")
    return weight_of(head).detach()


def column_of(model: nn.Module, vector: ValueVector) -> Tensor:
    """(width,) the value vector as it is stored, a view of the parameter.

    Raises:
        CheckpointError: No such layer or column.
    """
    name, matrix = value_matrix(model, vector.layer)
    weight = weight_of(matrix)
    if not 0 <= vector.column < weight.shape[1]:
        raise CheckpointError(f"column {vector.column}: {name} has columns 0 to {weight.shape[1] - 1}.")
    return weight[:, vector.column]


def first_tokens(embedding: Tensor, vector: Tensor, top: int = TOP) -> list[int]:
    """The tokens that a vector makes likeliest, the likeliest first."""
    logits = embedding.float() @ vector.detach().float().to(embedding.device)
    tokens: list[int] = logits.topk(min(top, len(logits))).indices.tolist()
    return tokens


def jaccard(first: Sequence[Any], second: Sequence[Any]) -> float:
    """What two collections share, as a share of all that is in either; 1 if both are empty."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else 1.0


@torch.no_grad()
def find_vectors(
    model: Any,
    concepts: Sequence[dict[int, int]],
    top: int = TOP,
    begin: float = 0.5,
    dropped: float = 0.3,
) -> list[ValueVector]:
    """For each concept, the value vector whose first tokens, or its negative's, hold most of its words.

    Args:
        model: A causal language model.
        concepts: Of each, token -> number of the word, as `word_tokens` makes it.
        top: First tokens that are looked at.
        begin: Where the layers that are looked at begin, as a share of all.
        dropped: Share of a layer's vectors that are left out: those with the lowest mean first logits.
    """
    embedding = output_embedding(model)
    number = len(decoder_layers(model))
    layers = range(int(begin * number), number)
    tables = [_table(words, embedding) for words in concepts]
    best: list[tuple[int, float, ValueVector]] = [(-1, 0.0, ValueVector(0, 0))] * len(concepts)
    with bar("scanning value vectors", len(layers)) as advance:
        for layer in layers:
            counts, means = _scan(embedding, weight_of(value_matrix(model, layer)[1]), tables, top)
            means[means < means.quantile(dropped)] = -torch.inf
            for index, words in enumerate(concepts):
                best[index] = _better(best[index], layer, counts[index], means, _size(words, top))
            advance()
    return [vector for _, _, vector in best]


def _table(words: dict[int, int], embedding: Tensor) -> Tensor:
    """(vocabulary,) the number of each token's word plus one, 0 for tokens of no word."""
    table = torch.zeros(len(embedding), dtype=torch.long, device=embedding.device)
    for token, word in words.items():
        table[token] = word + 1
    return table


def _size(words: dict[int, int], top: int) -> int:
    return max(1, min(len(set(words.values())), top))


def _scan(embedding: Tensor, weight: Tensor, tables: Sequence[Tensor], top: int) -> tuple[Tensor, Tensor]:
    """(concepts, 2 columns) different words among the first tokens, and (2 columns,) their mean logits.

    The columns come first, then their negatives.
    """
    top = min(top, len(embedding))
    counts: list[list[Tensor]] = [[], []]
    means: list[list[Tensor]] = [[], []]
    head = embedding.float().T
    for columns in weight.split(_CHUNK, dim=1):
        logits = columns.T.float() @ head
        for side, sign in enumerate((1, -1)):
            values, tokens = logits.topk(top, dim=1, largest=sign > 0)
            means[side].append(sign * values.mean(dim=1))
            counts[side].append(torch.stack([_different(table[tokens], table) for table in tables]))
    both = torch.cat([torch.cat(side, dim=1) for side in counts], dim=1)
    return both, torch.cat([torch.cat(side) for side in means])


def _different(words: Tensor, table: Tensor) -> Tensor:
    """(rows,) how many different words are in each row; 0 is no word."""
    seen = torch.zeros(len(words), int(table.max()) + 1, device=words.device)
    return seen.scatter_(1, words, 1.0)[:, 1:].sum(dim=1)


def _better(
    best: tuple[int, float, ValueVector], layer: int, counts: Tensor, means: Tensor, size: int
) -> tuple[int, float, ValueVector]:
    """The best so far, or this layer's best if that has more words, or as many at higher logits."""
    kept = torch.where(means.isfinite(), counts, -torch.ones_like(counts))
    tied = torch.where(kept == kept.max(), means, torch.full_like(means, -torch.inf))
    place = int(tied.argmax())
    count, mean = int(kept[place]), float(means[place])
    if (count, mean) <= best[:2]:
        return best
    half = len(counts) // 2
    sign = 1 if place < half else -1
    return count, mean, ValueVector(layer, place % half, sign, count / size)


@contextmanager
def replaced(model: nn.Module, vector: ValueVector, value: Tensor) -> Iterator[None]:
    """Inside, the model's value vector is `value`; afterwards it is bit for bit what it was."""
    column = column_of(model, vector)
    with torch.no_grad():
        before = column.clone()
        column.copy_(value)
        try:
            yield
        finally:
            column.copy_(before)


def noise_like(column: Tensor, deviation: float, seed: int) -> Tensor:
    """Gaussian noise of a column's shape, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(column.shape, generator=generator) * deviation).to(column)
