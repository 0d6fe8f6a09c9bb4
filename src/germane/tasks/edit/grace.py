"""GRACE: a codebook of hidden states, each with a value that takes the layer's place around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from germane.core.checkpoint import Checkpoint
from germane.core.errors import CheckpointError
from germane.core.layers import check_layer, value_matrix, weight_of
from germane.core.objective import IGNORED
from germane.core.progress import bar
from germane.core.training import require_finite
from germane.edited import Edit, Editing, Editor
from germane.method import method
from germane.tasks.edit._answers import answer_losses

_SAME = 1e-3  # distance under which two keys are one prompt's: states vary so much by how they are batched
_APART = 1e-5  # by which two balls that were split are kept apart


class Codebook:
    """Keys with their balls, values and answers.

    Attributes:
        keys: (entries, inputs) states that go into the value matrix.
        values: (entries, outputs) what comes out instead, near a key.
        epsilons: (entries,) radii of the balls.
        answers: (entries, tokens) what each value was trained to say, padded with -100.
    """

    def __init__(self, inputs: int, outputs: int, place: torch.device) -> None:
        self.keys = torch.zeros(0, inputs, device=place)
        self.values = torch.zeros(0, outputs, device=place)
        self.epsilons = torch.zeros(0, device=place)
        self.answers = torch.zeros(0, 0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.epsilons)

    def distances(self, queries: Tensor) -> Tensor:
        """(queries, entries) Euclidean distances."""
        # The quick way by products loses what tells near states apart.
        return torch.cdist(queries.float(), self.keys, compute_mode="donot_use_mm_for_euclid_dist")

    def find(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(queries,) the nearest entry whose ball holds each query, and whether there is one."""
        distances = self.distances(queries)
        inside = distances.masked_fill(distances > self.epsilons, torch.inf)
        nearest, index = inside.min(dim=1)
        return index, nearest.isfinite()

    def place(self, query: Tensor, value: Tensor, answer: Sequence[int], epsilon: float) -> int:
        """Make room for an edit; the number of the entry whose value is to be trained.

        Args:
            query: (inputs,) the state at the prompt's last token.
            value: (outputs,) where training begins, for a new entry.
            answer: Tokens of the new answer.
            epsilon: Radius of a new ball.
        """
        if not len(self):
            return self._add(query, value, answer, epsilon)
        distances = self.distances(query.unsqueeze(0))[0]
        nearest = int(distances.argmin())
        distance = float(distances[nearest])
        if distance > epsilon + float(self.epsilons[nearest]):
            return self._add(query, value, answer, epsilon)
        if distance <= _SAME or self.answer(nearest) == list(answer):
            self._label(nearest, answer)
            self.epsilons[nearest] = max(distance, float(self.epsilons[nearest]))
            return nearest
        self.epsilons[nearest] = distance / 2 - _APART
        return self._add(query, value, answer, distance / 2)

    def answer(self, number: int) -> list[int]:
        """Tokens that an entry's value was trained to say."""
        return [token for token in self.answers[number].tolist() if token != IGNORED]

    def _add(self, query: Tensor, value: Tensor, answer: Sequence[int], epsilon: float) -> int:
        self.keys = torch.cat([self.keys, query.detach().float().unsqueeze(0)])
        self.values = torch.cat([self.values, value.detach().float().unsqueeze(0)])
        self.epsilons = functional.pad(self.epsilons, (0, 1), value=epsilon)
        self.answers = functional.pad(self.answers, (0, 0, 0, 1), value=IGNORED)
        self._label(len(self) - 1, answer)
        return len(self) - 1

    def _label(self, number: int, answer: Sequence[int]) -> None:
        room = max(0, len(answer) - self.answers.shape[1])
        self.answers = functional.pad(self.answers, (0, room), value=IGNORED)
        self.answers[number] = IGNORED
        self.answers[number, : len(answer)] = torch.tensor(list(answer))


class Memory:
    """A codebook, and the hook through which it acts.

    Attributes:
        book: The codebook.
        trained: Number and (outputs,) value of the entry that is being trained, if one is.
        seen: (rows, tokens, inputs) states and (rows, tokens, outputs) of the last call.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        _, matrix = value_matrix(model, layer)
        weight = weight_of(matrix)
        self.book = Codebook(weight.shape[1], weight.shape[0], weight.device)
        self.trained: tuple[int, Tensor] | None = None
        self.seen = torch.zeros(0), torch.zeros(0)
        matrix.register_forward_hook(self._act)

    def _act(self, matrix: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        self.seen = inputs[0].detach(), output.detach()
        if not len(self.book):
            return None
        found, inside = self.book.find(inputs[0].flatten(0, -2))
        values = self.book.values
        if self.trained:
            number, value = self.trained
            values = torch.cat([values[:number], value.unsqueeze(0), values[number + 1 :]])
        states = output.flatten(0, -2)
        return torch.where(inside.unsqueeze(1), values[found].to(output.dtype), states).view_as(output)


@method("edit/grace", paper="2211.11031", code="thartvigsen/grace", needs=("language model",))
class Grace(Editor):
    """Keep each edit as a key, a value and a radius; a state within the radius is replaced by the value.

    Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
    NeurIPS 2023. Keys are the states that go into one value matrix at a prompt's last token, values what
    comes out of it instead. For an edit whose nearest key, with radius r, is at distance d: if
    d > r + epsilon, a new key with radius epsilon is added; else if the answers are the same, r becomes
    max(r, d); else both balls are cut to d / 2. Then Adam trains the value until the answer comes.

    Use it when edits must take, stay and touch nothing else.
    Not when they should hold for other wordings: a radius wide enough for those takes in other prompts.

    Differs from the paper and the code: there the prompt's last token alone is looked up, where the caller
    says where it is. Here every token is, so that the same states are replaced whether a text is read or
    continued; at a prompt's last token the two agree. Of overlapping balls the nearest that holds the
    state answers; the code takes the nearest key even if its ball does not. Answers are the same if their
    tokens are; in the code, if the means of the tokens' numbers are. A prompt that was edited before gets a
    new value; in the code both balls shrink to nothing. Training ends when the answer comes; in the code
    after `steps`. Values begin at random, as in the released settings, or with `start: output` at the
    layer's own output. Replacing all tokens, or the prompt, is left out.
    """

    layer: int = Field(default=-5, description="layer whose value matrix is replaced around the keys")
    learning_rate: float = Field(default=1.0, gt=0, description="of Adam")
    steps: int = Field(default=50, gt=0, description="most steps for an edit")
    enough: float = Field(default=0.01, ge=0, description="loss at which an edit is done")
    epsilon: float = Field(default=1.0, gt=0, description="radius of a new ball, in units of the states")
    start: Literal["output", "random"] = Field(
        default="random", description="where a value's training begins: the layer's output, or at random"
    )

    def check(self, edits: Sequence[Edit], source: Checkpoint | None) -> None:
        if source is not None:
            check_layer(source, self.layer)

    def attach(self, editing: Editing, state: dict[str, Tensor]) -> None:
        memory = Memory(editing.model, self.layer)
        editing.memory = memory
        for name, tensor in state.items():
            kept = getattr(memory.book, name)
            if name in ("keys", "values") and tensor.shape[1] != kept.shape[1]:
                raise CheckpointError(
                    f"a codebook with {name} of width {tensor.shape[1]} does not fit layer {self.layer}, "
                    f"which needs {kept.shape[1]}: name the layer it was made for."
                )
            setattr(memory.book, name, tensor.to(kept.device))

    def state(self, editing: Editing) -> dict[str, Tensor]:
        book = editing.memory.book
        if not len(book):
            return {}
        return {name: getattr(book, name) for name in ("keys", "values", "epsilons", "answers")}

    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        editing.model.requires_grad_(False).eval()
        with bar("filling the codebook", len(edits)) as advance:
            for edit in edits:
                self._learn(editing, edit)
                advance()
        editing.model.requires_grad_(True)

    def _learn(self, editing: Editing, edit: Edit) -> None:
        memory: Memory = editing.memory
        number = self._place(editing, edit)
        value = memory.book.values[number].clone().requires_grad_(True)
        optimiser = torch.optim.Adam([value], lr=self.learning_rate)
        memory.trained = number, value
        for step in range(1, self.steps + 1):
            loss = answer_losses(editing.model, editing.tokenizer, [(edit.prompt, edit.answer)]).mean()
            require_finite(float(loss.detach()), "the loss", f"edit {edit.id}, step {step}")
            if float(loss.detach()) <= self.enough:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        memory.trained = None
        memory.book.values[number] = value.detach()

    @torch.no_grad()
    def _place(self, editing: Editing, edit: Edit) -> int:
        """The entry for an edit, by the state at its prompt's last token."""
        memory: Memory = editing.memory
        tokenizer, model = editing.tokenizer, editing.model
        prompt = tokenizer(edit.prompt, return_tensors="pt")["input_ids"].to(model.device)
        model(input_ids=prompt, use_cache=False)
        query, output = (states.flatten(0, -2)[-1] for states in memory.seen)
        if self.start == "random":
            generator = torch.Generator().manual_seed(editing.seed + len(memory.book))
            output = torch.rand(output.shape, generator=generator).to(output)
        answer = tokenizer(edit.answer, add_special_tokens=False)["input_ids"]
        return memory.book.place(query, output, answer, self.epsilon)
