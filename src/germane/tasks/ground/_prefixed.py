"""A language model that reads soft tokens before its prompt: trained, kept and asked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from germane.core.chat import Reply, padding
from germane.core.checkpoint import read_json, save_tensors
from germane.core.errors import CheckpointError, MissingExtra, SettingError
from germane.core.generation import context_of
from germane.core.local_chat import LocalChat, batches
from germane.core.objective import IGNORED, token_losses
from germane.core.settings import validate
from germane.core.training import Training, fit
from germane.tasks.ground._aspects import AspectPrefix, AspectSettings, Prefix, Texts, embed

ADAPTER = "adapter"  # folder in a result
_SETTINGS, _WEIGHTS = "adapter.json", "adapter.safetensors"
_TARGETS = ("gate_proj", "up_proj", "down_proj")
_DROPOUT, _SCALE = 0.1, 4  # of LoRA; its alpha is so many times the rank


class ReaderSettings(AspectSettings):
    """What a reader is made of."""

    lora_rank: int = Field(
        default=8,
        ge=0,
        description="rank of LoRA on gate, up and down projections; 0 leaves the model frozen",
    )


class Header(ReaderSettings):
    """What is said of an adapter beside its weights."""

    width: int = Field(gt=0, description="of the language model's embeddings")


@dataclass(frozen=True)
class Example:
    """A question as it is read.

    Attributes:
        texts: What its soft tokens are made from.
        prompt: Tokens of the prompt.
        answer: Tokens to learn, with the end; none where it is asked.
    """

    texts: Texts
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Written:
    """What was written after a prompt.

    Attributes:
        texts: One for each beam, the likeliest first.
        reply: The first of them.
        gates: (3, items) of the soft tokens.
        attention: (items, items) of pairs of entity and relation on subgraphs.
    """

    texts: list[str]
    reply: Reply
    gates: Tensor
    attention: Tensor


class Reader(nn.Module):
    """A language model with the modules that make its soft tokens."""

    def __init__(self, chat: LocalChat, model: Any, settings: ReaderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.chat = chat
        self.model = model
        self.embedding: Any = chat.model.get_input_embeddings()
        weight = self.embedding.weight
        spread = float(weight.detach().float().std())
        self.aspects = AspectPrefix(weight.shape[1], settings.soft_tokens, spread).to(weight.device)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Cross-entropy in nats, the mean over the answers' tokens."""
        prefix = self._prefix(examples)
        inputs, mask, labels = self._assemble(prefix.embeddings, examples)
        logits = self.model(inputs_embeds=inputs, attention_mask=mask).logits
        losses, counted = token_losses(logits, labels)
        return losses.sum() / counted.sum()

    def _prefix(self, examples: Sequence[Example]) -> Prefix:
        texts = Texts.stack([each.texts for each in examples], self.embedding.weight.device)
        found: Prefix = self.aspects(embed(self.embedding, texts))
        return found

    def _assemble(
        self, prefix: Tensor, examples: Sequence[Example], left: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, attention mask and labels of soft tokens, prompts and answers, padded.

        Args:
            prefix: (examples, soft tokens, width).
            examples: What comes after it.
            left: Pad before the soft tokens, so that all rows end together.
        """
        place = prefix.device
        rows, labels = [], []
        for soft, each in zip(prefix, examples, strict=True):
            tokens = torch.tensor(each.prompt + each.answer, device=place)
            rows.append(torch.cat([soft.to(self.embedding.weight.dtype), self.embedding(tokens)]))
            ignored = [IGNORED] * (len(soft) + len(each.prompt))
            labels.append(torch.tensor(ignored + each.answer, device=place))
        side = "left" if left else "right"
        ones = [torch.ones(len(row), dtype=torch.long, device=place) for row in rows]
        return (
            pad_sequence(rows, batch_first=True, padding_side=side),
            pad_sequence(ones, batch_first=True, padding_side=side),
            pad_sequence(labels, batch_first=True, padding_value=IGNORED, padding_side=side),
        )

    def learn(self, examples: Sequence[Example], settings: Training, seed: int) -> None:
        """Lower the loss on these examples."""
        generator = random.Random(seed)

        def drawn(epoch: int) -> Iterator[list[Example]]:
            order = generator.sample(list(examples), len(examples))
            for start in range(0, len(order), settings.batch_size):
                yield order[start : start + settings.batch_size]

        steps = -(-len(examples) // settings.batch_size)
        self.train()
        fit(self, settings, drawn, steps, self.loss, label="training the gate")
        self.eval()

    @torch.no_grad()
    def write(self, examples: Sequence[Example], max_tokens: int, beams: int) -> list[Written]:
        """What the model writes after each prompt, without sampling."""
        self.eval()
        soft = len(self.aspects.soft) + 3 * self.settings.items
        lengths = [soft + len(each.prompt) + max_tokens for each in examples]
        written: dict[int, Written] = {}
        for picked in batches(lengths, max(1, self.chat.batch_tokens // beams)):
            found = self._write([examples[number] for number in picked], max_tokens, beams)
            written.update(zip(picked, found, strict=True))
        return [written[number] for number in range(len(examples))]

    def _write(self, examples: Sequence[Example], max_tokens: int, beams: int) -> list[Written]:
        prefix = self._prefix(examples)
        inputs, mask, _ = self._assemble(prefix.embeddings, examples, left=True)
        # The soft tokens are read once, with the prompt; from then on their keys and values are kept.
        output = self.model.generate(
            inputs_embeds=inputs, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False,
            num_beams=beams, num_return_sequences=beams, pad_token_id=padding(self.chat.tokenizer),
        )  # fmt: skip
        rows = output.reshape(len(examples), beams, -1).tolist()
        return [
            self._written(row, int(read), max_tokens, gates, attention)
            for row, read, gates, attention in zip(
                rows, mask.sum(dim=1), prefix.gates.cpu(), prefix.attention.cpu(), strict=True
            )
        ]

    def _written(
        self, rows: list[list[int]], read: int, max_tokens: int, gates: Tensor, attention: Tensor
    ) -> Written:
        tokenizer = self.chat.tokenizer
        kept = [row[: _length(row, self._ends)] for row in rows]
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in kept]
        whole = len(kept[0]) < max_tokens
        reply = Reply(texts[0], "stop" if whole else "length", read, len(kept[0]) + whole, 0.0)
        return Written(texts, reply, gates, attention)

    @property
    def _ends(self) -> set[int | None]:
        ends = self.chat.model.generation_config.eos_token_id
        found = set(ends) if isinstance(ends, list) else {ends}
        return {*found, self.chat.tokenizer.eos_token_id, padding(self.chat.tokenizer)}

    def require_context(self, examples: Sequence[Example], more: int) -> None:
        """Refuse a question that the model has no room for, with `more` tokens to be written.

        Raises:
            SettingError: With the numbers.
        """
        context = context_of(self.chat.model.config.to_dict())
        soft = len(self.aspects.soft) + 3 * self.settings.items
        longest = max(soft + len(each.prompt) + max(more, len(each.answer)) for each in examples)
        if context is not None and longest > context:
            raise SettingError(
                f"{self.chat.name}: reads {context} tokens at most, and {soft} soft tokens, prompt and "
                f"answer have {longest}; lower items, soft_tokens or max_tokens."
            )

    def save(self, folder: Path) -> None:
        """Write what was trained into a new folder."""
        folder.mkdir(parents=True)
        header = Header(**self.settings.model_dump(), width=self.embedding.weight.shape[1])
        (folder / _SETTINGS).write_text(header.model_dump_json(indent=1) + "\n", encoding="utf-8")
        save_tensors({name: value.detach() for name, value in self.trained().items()}, folder / _WEIGHTS)

    def load(self, folder: Path) -> None:
        """Take what was trained before.

        Raises:
            CheckpointError: It is of another model.
        """
        from safetensors.torch import load_file

        tensors = load_file(folder / _WEIGHTS)
        wanted = {name: value.shape for name, value in self.trained().items()}
        if {name: value.shape for name, value in tensors.items()} != wanted:
            raise CheckpointError(f"{folder}: was trained for another model than {self.chat.name}.")
        self.load_state_dict(tensors, strict=False)


def _length(row: Sequence[int], ends: set[int | None]) -> int:
    return next((place for place, token in enumerate(row) if token in ends), len(row))


def read_header(folder: Path) -> Header:
    """The settings of an adapter that was kept.

    Raises:
        SettingError: There is none.
    """
    for name in (_SETTINGS, _WEIGHTS):
        if not (folder / name).is_file():
            raise SettingError(f"adapter: {folder} has no {name}; name the folder {ADAPTER!r} of a result.")
    return validate(Header, read_json(folder / _SETTINGS), str(folder / _SETTINGS))


def require_peft(settings: ReaderSettings) -> None:
    """Refuse LoRA where the library is missing."""
    if settings.lora_rank and find_spec("peft") is None:
        raise MissingExtra("peft", "adapters", "lora_rank above 0")


@contextmanager
def reading(chat: LocalChat, settings: ReaderSettings, seed: int) -> Iterator[Reader]:
    """A reader around the model, which is as it was afterwards.

    Args:
        chat: The model and its tokenizer.
        settings: What the reader is made of.
        seed: Of the new modules and of dropout.

    Raises:
        SettingError: The model has no projections for LoRA.
    """
    flags = [(value, value.requires_grad) for value in chat.model.parameters()]
    chat.model.requires_grad_(False)
    adapted: Any = None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = _adapted(chat, settings.lora_rank) if settings.lora_rank else None
            yield Reader(chat, adapted or chat.model, settings)
    finally:
        if adapted is not None:
            adapted.unload()
        for value, flag in flags:
            value.requires_grad_(flag)
        chat.model.eval()


def _adapted(chat: LocalChat, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, _ in chat.model.named_modules()}
    targets = [name for name in _TARGETS if name in names]
    if not targets:
        raise SettingError(f"lora_rank: {chat.name} has none of {', '.join(_TARGETS)}; 0 leaves it frozen.")
    chosen = LoraConfig(r=rank, lora_alpha=_SCALE * rank, lora_dropout=_DROPOUT, target_modules=targets)
    return get_peft_model(chat.model, chosen)
