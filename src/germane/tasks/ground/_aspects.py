"""Retrieved texts as soft tokens: three aspects are mapped, aligned with each other, and gated.

Everything here is in float32, whatever the language model is in: a mean of products over thousands of
dimensions loses its meaning in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from germane.core.chat import encode_text, padding
from germane.core.errors import CheckpointError
from germane.core.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASPECTS = ("entities", "relations", "subgraphs")
_HEADS = 4
_NARROWER = 16  # how many times narrower than the embeddings the map is inside


class AspectSettings(Settings):
    """How retrieved texts become soft tokens."""

    items: int = Field(default=4, gt=0, description="texts of each aspect that are read, best first")
    item_tokens: int = Field(default=32, gt=2, description="tokens of a text that are read")
    question_tokens: int = Field(
        default=16, gt=1, description="tokens of the question that texts are compared with"
    )
    soft_tokens: int = Field(default=16, ge=0, description="learned vectors before the texts'")
    masked_mean: bool = Field(
        default=True, description="leave padding out of means over tokens; the paper's code averages it in"
    )


@dataclass(frozen=True)
class Texts:
    """A question and its texts as tokens, or those of several questions, with one more dimension in front.

    Attributes:
        items: (3, items, item tokens) of entities, relations and subgraphs.
        items_counted: Of the same shape: 1 where a token counts, 0 where it is padding.
        question: (question tokens,).
        question_counted: (question tokens,) likewise.
    """

    items: Tensor
    items_counted: Tensor
    question: Tensor
    question_counted: Tensor

    @classmethod
    def stack(cls, texts: Sequence[Texts], place: torch.device) -> Texts:
        """Those of several questions as one, on a device."""
        parts = zip(*(vars(each).values() for each in texts), strict=True)
        return cls(*(torch.stack(part).to(place) for part in parts))


@dataclass(frozen=True)
class Vectors:
    """Texts of several questions as vectors.

    Attributes:
        items: (questions, 3, items, width) the mean of each text's tokens.
        question: (questions, question tokens, width).
        counted: (questions, question tokens) 1 where a token counts.
    """

    items: Tensor
    question: Tensor
    counted: Tensor


@dataclass(frozen=True)
class Prefix:
    """What is read before the prompts of several questions.

    Attributes:
        embeddings: (questions, soft tokens + 3 * items, width).
        gates: (questions, 3, items) between 0 and 1. Those of the third aspect belong to the pair of the
            entity and the relation in the same place, for which the subgraphs were asked.
        attention: (questions, items, items) how much each such pair looks at each subgraph; rows sum to 1.
    """

    embeddings: Tensor
    gates: Tensor
    attention: Tensor


def encode(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    aspects: Sequence[Sequence[str]],
    settings: AspectSettings,
) -> Texts:
    """A question and its texts as tokens.

    Args:
        tokenizer: The language model's.
        question: What is asked.
        aspects: Entities, relations and subgraphs, each at least one text.
        settings: How many, and how long.
    """
    items, counted = [], []
    for texts in aspects:
        found = [
            _framed(tokenizer, text, settings.item_tokens, settings.masked_mean)
            for text in texts[: settings.items]
        ]
        cycled = [found[place % len(found)] for place in range(settings.items)]
        items.append([tokens for tokens, _ in cycled])
        counted.append([which for _, which in cycled])
    asked, which = _framed(tokenizer, question, settings.question_tokens, settings.masked_mean, True)
    return Texts(torch.tensor(items), torch.tensor(counted), torch.tensor(asked), torch.tensor(which))


@torch.no_grad()
def embed(embedding: nn.Module, texts: Texts) -> Vectors:
    """Texts of several questions by the language model's embeddings."""
    counted = texts.items_counted
    totals = (embedding(texts.items).float() * counted[..., None]).sum(dim=-2)
    means = totals / counted.sum(dim=-1, keepdim=True)
    return Vectors(means, embedding(texts.question).float(), texts.question_counted)


def _framed(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, masked: bool, end: bool = False
) -> tuple[list[int], list[float]]:
    """Beginning, text and end, padded or cut to a length; and 1 where a token counts.

    Args:
        tokenizer: The language model's.
        text: Someone else's: nothing in it is a special token.
        length: In tokens.
        masked: Whether padding does not count.
        end: Whether the end is the last token even of what is padded or cut.
    """
    first, last = ([t] if t is not None else [] for t in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    fill = padding(tokenizer)
    body = first + encode_text(tokenizer, text)
    tokens = (body[: length - len(last)] if end else (body + last)[:length]) or [fill]
    rest = length - len(tokens) - (len(last) if end else 0)
    counted = [1.0] * len(tokens) + [0.0 if masked else 1.0] * rest
    if end:
        return tokens + [fill] * rest + last, counted + [1.0] * len(last)
    return tokens + [fill] * rest, counted


def _perceptron(width: int, inside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inside), nn.GELU(), nn.Linear(inside, width))


class AspectMap(nn.Module):
    """From the space of embeddings to that of soft tokens, an MLP for each aspect."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_perceptron(width, max(1, width // _NARROWER)) for _ in ASPECTS)

    def forward(self, items: Tensor) -> list[Tensor]:
        """(questions, 3, items, width) vectors to (questions, items, width) ones of each aspect."""
        return [part(vectors) for part, vectors in zip(self.maps, items.unbind(dim=1), strict=True)]


class SelfAlignment(nn.Module):
    """Entities and relations look at themselves, and ask the subgraphs what confirms them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        kinds = ("entity_subgraph", "relation_subgraph", "entity", "relation")
        self.attention = nn.ModuleDict(
            {kind: nn.MultiheadAttention(width, _HEADS, batch_first=True) for kind in kinds}
        )

    def forward(self, aspects: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """(questions, items, width) of each aspect, aligned; and the attention on the subgraphs."""
        entities, relations, subgraphs = aspects
        of_entities, seen = self.attention["entity_subgraph"](entities, subgraphs, subgraphs)
        of_relations, seen_too = self.attention["relation_subgraph"](relations, subgraphs, subgraphs)
        entities = self.attention["entity"](entities, entities, entities, need_weights=False)[0]
        relations = self.attention["relation"](relations, relations, relations, need_weights=False)[0]
        return [entities, relations, of_entities + of_relations], (seen + seen_too) / 2


class RelevanceGate(nn.Module):
    """How relevant each item is: the sigmoid of its mean product with the question's tokens.

    Item and token go through the same MLP. The product is not scaled by the width, as in the paper.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.question = _perceptron(width, width // 2)
        self.shared = nn.ModuleList(_perceptron(width, width // 2) for _ in ASPECTS)

    def forward(self, question: Tensor, counted: Tensor, aspects: Sequence[Tensor]) -> Tensor:
        """The gates.

        Args:
            question: (questions, question tokens, width).
            counted: (questions, question tokens) 1 where a token counts.
            aspects: Three of (questions, items, width).

        Returns:
            (questions, 3, items) between 0 and 1.
        """
        dense = self.question(question)
        weights = (counted / counted.sum(dim=1, keepdim=True)).to(dense.dtype)
        gates = []
        for part, vectors in zip(self.shared, aspects, strict=True):
            products = part(vectors) @ part(dense).transpose(1, 2)
            gates.append((products * weights[:, None]).sum(dim=2).sigmoid())
        return torch.stack(gates, dim=1)


class AspectPrefix(nn.Module):
    """From the vectors of texts to soft tokens before a prompt.

    Args:
        width: Of the language model's embeddings.
        soft_tokens: Learned vectors in front.
        spread: Standard deviation of these before training: that of the model's embeddings.

    Raises:
        CheckpointError: The width cannot be shared among the heads.
    """

    def __init__(self, width: int, soft_tokens: int, spread: float) -> None:
        super().__init__()
        if width % _HEADS:
            raise CheckpointError(f"embeddings of {width} numbers cannot be shared among {_HEADS} heads.")
        self.soft = nn.Parameter(torch.randn(soft_tokens, width) * spread)
        self.map = AspectMap(width)
        self.align = SelfAlignment(width)
        self.gate = RelevanceGate(width)

    def forward(self, vectors: Vectors) -> Prefix:
        """Of several questions' texts, what is read before their prompts."""
        with torch.autocast(vectors.items.device.type, enabled=False):
            aligned, attention = self.align(self.map(vectors.items))
            gates = self.gate(vectors.question, vectors.counted, aligned)
            gated = [values * gates[:, place, :, None] for place, values in enumerate(aligned)]
            soft = self.soft.expand(len(gates), -1, -1)
            return Prefix(torch.cat([soft, *gated], dim=1), gates, attention)
