"""Octopus v4: one token a member of the pool, and a small language model that learns to say it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from germane.core.chat import (
    encode_conversation,
    encode_marked,
    encode_text,
    load_language_model,
    load_tokenizer,
    mark_special,
    pad_left,
    padding,
)
from germane.core.errors import MissingExtra, SettingError
from germane.core.evidence import Plot, Series
from germane.core.progress import bar, track
from germane.embedded import SMOLLM2, model_folder
from germane.method import method
from germane.tasks.route._graph import Graph
from germane.tasks.route._router import Card, Example, Guess, RouteMethod, Router, Training
from germane.tasks.route._tokens import (
    IGNORED,
    Call,
    add_tokens,
    batches,
    disarm,
    embedding_weights,
    fit_rows,
    grow,
    parse_call,
    row_modules,
    schedule,
    token_numbers,
    weighted_cross_entropy,
    write_call,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_README = """# A router made by germane

`router.json` says which model of the pool each functional token stands for. The adapter loads in
plain PEFT ("smollm2" is the folder `germane.embedded.smollm2()`):

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    base = AutoModelForCausalLM.from_pretrained({base!r})
    base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().weight.shape[0]))
    router = PeftModel.from_pretrained(base, FOLDER)
"""


@method(
    "route/functional-token", paper="2404.19296", code="NexaAI/octopus-v4", needs=("labels", "training")
)
class FunctionalToken(RouteMethod):
    """Teach a small language model one new token for each node, and to rewrite the query for it.

    Chen and Li, "Octopus v4: Graph of language models", 2024. The model reads a system line and the
    query in its own chat format and writes `<route_3>('the query, rewritten')<route_end>`; no
    descriptions are in the prompt. LoRA on all linear layers, and the new rows of the embeddings,
    lower the cross-entropy of the call. The paper gives no rates, epochs or sizes: the defaults are
    germane's. Queries without a rewritten form teach `<route_3>()<route_end>`: pass it on as it is.

    With `frozen` the model stays as it is and only the output rows of the functional tokens are
    trained, on cached hidden states: one pass over the queries, and they are never rewritten.

    Use it when labelled queries are at hand, nodes differ in more than topic words, or queries must
    be rewritten for the model that answers.
    Not with a few queries a node and topics a sentence encoder tells apart: route/embedding costs
    less.

    Holds the base in float32, and the hidden states of one batch.
    """

    base: str = Field(default=SMOLLM2, description="language model: folder, hub id, or smollm2 (PyPI)")
    frozen: bool = Field(default=False, description="train only the functional tokens' output rows")
    rank: int = Field(default=16, gt=0, description="of LoRA, on all linear layers")
    alpha: float = Field(default=32.0, gt=0, description="of LoRA: its output is scaled by alpha / rank")
    epochs: int = Field(default=3, ge=0, description="passes over the queries with LoRA")
    batch_size: int = Field(default=8, gt=0, description="queries in a step of LoRA")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW on LoRA's weights")
    row_learning_rate: float = Field(default=5e-3, gt=0, description="of AdamW on the new rows")
    frozen_steps: int = Field(default=300, ge=0, description="steps over all queries when frozen")
    token_weight: float = Field(default=1.0, ge=1, description="weight of functional tokens in the loss")
    noise: float = Field(default=0.1, ge=0, description="of the new rows at first, in deviations of a row")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="arithmetic of LoRA's training and of routing"
    )
    system: str = Field(
        default="You are a router. Call the right function for the query.",
        description="system line before every query",
    )
    max_query_tokens: int = Field(default=256, gt=0, description="longer queries are cut here")
    max_new_tokens: int = Field(default=200, gt=0, description="longest call")

    def prepare(self) -> None:
        model_folder(self.base)
        _require_peft()

    def train(self, training: Training) -> Router:
        card, examples, seed = training.card, training.examples, training.seed
        model, tokenizer = load_language_model(str(model_folder(self.base)), torch.float32)
        tokens = add_tokens(model, tokenizer, len(card.nodes), self.noise, seed)
        lesson = Lesson(self, model, tokenizer, tokens, card.nodes)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            trained, losses = lesson.fit_rows(examples) if self.frozen else lesson.fit(examples, seed)
        trained.eval()
        self._save(trained, tokenizer, training.folder)
        training.step.plots.append(
            Plot(
                title="Cross-entropy of the calls while the router learns",
                x="step",
                y="nats a token",
                series=[Series(name="loss", steps=list(range(len(losses))), values=losses)],
            )
        )
        learned = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        training.step.facts["trained_parameters"] = learned
        return FunctionalTokenRouter(card, training.graph, self, trained, tokenizer, tokens)

    def _save(self, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        model.peft_config["default"].base_model_name_or_path = self.base
        model.save_pretrained(folder, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_README.format(base=self.base), encoding="utf-8")

    def open(self, card: Card, graph: Graph, folder: Path) -> Router:
        _require_peft()
        from peft import PeftModel

        tokenizer = load_tokenizer(str(folder))
        base, _ = load_language_model(str(model_folder(self.base)), torch.float32, tokenizer)
        grow(base, tokenizer)
        with quiet_ties():
            model = PeftModel.from_pretrained(base, folder).eval()
        tokens = token_numbers(tokenizer, len(card.nodes))
        return FunctionalTokenRouter(card, graph, self, model, tokenizer, tokens)


@dataclass(frozen=True)
class Lesson:
    """A base with new rows, and how it is taught.

    Attributes:
        settings: The method.
        model: The base, with a row for each new token.
        tokenizer: With the new tokens.
        tokens: The new tokens' numbers, the end token's last.
        nodes: What they stand for.
    """

    settings: FunctionalToken
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: list[int]
    nodes: list[str]

    def fit(self, examples: Sequence[Example], seed: int) -> tuple[Any, list[float]]:
        """LoRA and the new rows; returns the PEFT model and the loss at each step."""
        model = self._with_lora()
        rows = [self._encode(example) for example in examples]
        generator = torch.Generator().manual_seed(seed)
        lengths = [len(tokens) for tokens, _ in rows]
        size = self.settings.batch_size
        plan = [group for _ in range(self.settings.epochs) for group in batches(lengths, size, generator)]
        optimiser = self._optimiser(model)
        rates = [group["lr"] for group in optimiser.param_groups]
        losses: list[float] = []
        model.train()
        with bar("training the router", len(plan)) as advance:
            for number, group in enumerate(plan):
                for part, rate in zip(optimiser.param_groups, rates, strict=True):
                    part["lr"] = rate * schedule(number, len(plan))
                losses.append(self._step(model, optimiser, [rows[index] for index in group]))
                advance(note=f"loss {losses[-1]:.3f}")
        return model, losses

    def _with_lora(self) -> Any:
        from peft import LoraConfig, get_peft_model

        configuration = LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            target_modules="all-linear",
            trainable_token_indices=dict.fromkeys(row_modules(self.model), self.tokens),
            task_type="CAUSAL_LM",
        )
        with quiet_ties():
            return get_peft_model(self.model, configuration)

    def _optimiser(self, model: Any) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        rows = [p for name, p in named if "trainable_tokens" in name]
        others = [p for name, p in named if "trainable_tokens" not in name]
        groups = [
            {"params": others, "lr": self.settings.learning_rate},
            {"params": rows, "lr": self.settings.row_learning_rate},
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def _encode(self, example: Example) -> tuple[list[int], int]:
        """Tokens of prompt and call, and where the call begins."""
        prompt = encode_query(self.settings, self.tokenizer, example.query)
        argument = example.rewritten
        if argument is not None:
            argument = mark_special(self.tokenizer, disarm(argument))
        call = write_call(self.nodes.index(example.node), argument)
        return prompt + encode_marked(self.tokenizer, call), len(prompt)

    def _step(
        self, model: Any, optimiser: torch.optim.Optimizer, rows: Sequence[tuple[list[int], int]]
    ) -> float:
        tokens, mask = pad_right([row for row, _ in rows], padding(self.tokenizer), self.model.device)
        labels = torch.full_like(tokens, IGNORED)
        for index, (row, begin) in enumerate(rows):
            labels[index, begin - 1 : len(row) - 1] = tokens[index, begin : len(row)]
        kept = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        with arithmetic(self.settings, tokens.device):
            logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=kept).logits
        labels = labels[:, kept]
        special = torch.isin(labels, torch.tensor(self.tokens, device=labels.device))
        weights = torch.where(special, self.settings.token_weight, 1.0)
        loss = weighted_cross_entropy(logits.float(), labels, weights)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        return float(loss.detach())

    def fit_rows(self, examples: Sequence[Example]) -> tuple[Any, list[float]]:
        """Only the functional tokens' output rows; returns the PEFT model and the losses."""
        from peft import TrainableTokensConfig, get_peft_model

        states, others = self._states([example.query for example in examples])
        labels = torch.tensor([self.nodes.index(e.node) for e in examples], device=states.device)
        numbers = self.tokens[:-1]
        start = embedding_weights(self.model)[-1].data[numbers]
        rows, losses = fit_rows(
            states, others, labels, start, self.settings.frozen_steps, self.settings.row_learning_rate
        )
        configuration = TrainableTokensConfig(
            token_indices=numbers, target_modules=row_modules(self.model)[-1:], task_type="CAUSAL_LM"
        )
        with quiet_ties():
            model = get_peft_model(self.model, configuration)
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.data.copy_(rows)
        return model, losses

    @torch.no_grad()
    def _states(self, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(queries, width) states that the output rows read, and what all other tokens come to."""
        prompts = [encode_query(self.settings, self.tokenizer, query) for query in queries]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        size = self.settings.batch_size
        starts = range(0, len(order), size)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for start in track(starts, "reading the queries", len(starts)):
            picked = order[start : start + size]
            states, others = self._read([prompts[index] for index in picked])
            found.update({index: (states[n], others[n]) for n, index in enumerate(picked)})
        pairs = [found[index] for index in range(len(prompts))]
        return torch.stack([state for state, _ in pairs]), torch.stack([other for _, other in pairs])

    def _read(self, prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        tokens, mask = pad_right(prompts, padding(self.tokenizer), self.model.device)
        last = mask.sum(dim=1) - 1
        kept, place = last.unique(return_inverse=True)
        with caught_input(self.model.get_output_embeddings()) as caught:
            logits = self.model(input_ids=tokens, attention_mask=mask, logits_to_keep=kept).logits
        rows = torch.arange(len(prompts), device=tokens.device)
        states, logits = caught[0][rows, place].float(), logits[rows, place].float()
        own = states @ embedding_weights(self.model)[-1].data[self.tokens[:-1]].float().T
        if not torch.allclose(own, logits[:, self.tokens[:-1]], atol=1e-2, rtol=1e-2):
            raise SettingError(
                f"frozen: {self.settings.base} changes its logits after the output layer, which frozen "
                "rows cannot allow for; train with LoRA instead."
            )
        logits[:, self.tokens[:-1]] = -torch.inf
        return states, logits.logsumexp(dim=1)


class FunctionalTokenRouter(Router):
    """Greedy decoding of a call; the functional token's probability is its score."""

    batch_size = 8

    def __init__(
        self,
        card: Card,
        graph: Graph,
        settings: FunctionalToken,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        tokens: list[int],
    ) -> None:
        super().__init__(card, graph, settings.threshold)
        from transformers import GenerationConfig

        self._settings = settings
        self._model = model
        self._model.generation_config = GenerationConfig()  # a base's own penalties would bend the scores
        self._tokenizer = tokenizer
        self._tokens = tokens

    def guess(self, queries: Sequence[str]) -> list[Guess]:
        prompts = [encode_query(self._settings, self._tokenizer, query) for query in queries]
        written, scores = self._decode(prompts)
        return [self._guess(*row) for row in zip(queries, written, scores.tolist(), strict=True)]

    def _guess(self, query: str, written: list[int], scores: list[float]) -> Guess:
        output = self._tokenizer.decode(written, skip_special_tokens=False)
        if self._settings.frozen:
            known = written[0] in self._tokens[:-1]
            call: Call | str = (
                Call(self._tokens.index(written[0]), None) if known else "no functional token"
            )
        else:
            call = parse_call(output)
        if isinstance(call, str):
            return Guess(scores, None, query, output, call)
        if call.number >= len(scores):
            return Guess(scores, None, query, output, f"no node has the token of {call.number}")
        return Guess(scores, call.number, call.argument or query, output)

    @torch.no_grad()
    def _decode(self, prompts: Sequence[list[int]]) -> tuple[list[list[int]], Tensor]:
        """What is written to each prompt, and (prompts, nodes) probabilities of the first token."""
        tokens, mask = pad_left(prompts, padding(self._tokenizer), self._model.device)
        watch = FirstToken(self._tokens[:-1], tokens.shape[1])
        with arithmetic(self._settings, tokens.device):
            output = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=1 if self._settings.frozen else self._settings.max_new_tokens,
                eos_token_id=self._tokens[-1],
                pad_token_id=padding(self._tokenizer),
                logits_processor=[watch.read],
                stopping_criteria=[watch.stop],
            )
        rows = [self._until_end(row) for row in output[:, tokens.shape[1] :].tolist()]
        return rows, watch.probabilities

    def _until_end(self, row: list[int]) -> list[int]:
        end = self._tokens[-1]
        if row[0] not in self._tokens:
            return row[:1]
        return row[: row.index(end) + 1] if end in row else row


class FirstToken:
    """Watches generation: keeps the first token's probabilities, stops what begins with no call."""

    def __init__(self, tokens: list[int], begin: int) -> None:
        self._tokens = tokens
        self._begin = begin
        self.probabilities = torch.empty(0)

    def read(self, written: Tensor, logits: Tensor) -> Tensor:
        """Keep the probabilities, over the whole vocabulary, of the functional tokens."""
        if written.shape[1] == self._begin:
            self.probabilities = logits.float().softmax(dim=1)[:, self._tokens].cpu()
        return logits

    def stop(self, written: Tensor, scores: Any, **_: Any) -> Tensor:
        """(rows,) whether the first token is no functional one."""
        known = torch.tensor(self._tokens, device=written.device)
        return ~torch.isin(written[:, self._begin], known)


def encode_query(settings: FunctionalToken, tokenizer: PreTrainedTokenizerBase, query: str) -> list[int]:
    """The tokens of the prompt: system line and query; what looks like a call in it is broken up."""
    text = disarm(query)
    tokens = encode_text(tokenizer, text)
    if len(tokens) > settings.max_query_tokens:
        text = tokenizer.decode(tokens[: settings.max_query_tokens])
    messages = [{"role": "system", "content": settings.system}, {"role": "user", "content": text}]
    return encode_conversation(tokenizer, messages)


def pad_right(rows: Sequence[Sequence[int]], fill: int, place: torch.device) -> tuple[Tensor, Tensor]:
    """(rows, width) tokens that all begin in the first column, and the mask of what is no padding."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=place)
    lengths = torch.tensor([len(row) for row in rows], device=place)
    return tokens, (torch.arange(width, device=place) < lengths[:, None]).long()


def arithmetic(settings: FunctionalToken, place: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The precision asked for, inside a `with`."""
    return torch.autocast(place.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


@contextlib.contextmanager
def caught_input(module: Any) -> Iterator[list[Tensor]]:
    """Collects what goes into a module inside a `with`."""
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        handle.remove()


@contextlib.contextmanager
def quiet_ties() -> Iterator[None]:
    """Silences PEFT's warning on merging tied embeddings: routers are not merged into their base."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        yield


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise MissingExtra("peft", "adapters", "route/functional-token") from None
