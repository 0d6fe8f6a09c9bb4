"""Backpack language models: each word has sense vectors, and what is predicted is a weighted sum of them.

Hewitt et al., "Backpack Language Models", ACL 2023. The modules and weights are called as those of
stanfordnlp/backpack-gpt2 on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    GPT2Config,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

Sense = tuple[int, int]  # a token, and which of its senses


class BackpackConfig(GPT2Config):  # type: ignore[misc]
    """Of `BackpackForCausalLM`: that of the GPT-2 which weighs the senses, and of the senses.

    Args:
        num_senses: Sense vectors of a word, k.
        sense_intermediate_scale: Width of the map from a word to its senses, in embeddings.
        changed_senses: Single senses that something is added to.
    """

    model_type = "germane-backpack"

    vocab_size: int = 50264
    n_positions: int = 512
    scale_attn_by_inverse_layer_idx: bool = True
    use_cache: bool = False
    num_senses: int = 16
    sense_intermediate_scale: int = 4
    changed_senses: int = 0


class _FeedForward(nn.Module):
    def __init__(self, config: BackpackConfig, hidden: int, out: int) -> None:
        super().__init__()
        self.c_fc = Conv1D(hidden, config.n_embd)
        self.c_proj = Conv1D(out, hidden)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, states: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(states))))


class _Block(nn.Module):
    """A layer that mixes no positions."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = _FeedForward(config, 4 * config.n_embd, config.n_embd)
        self.resid_dropout1 = nn.Dropout(config.resid_pdrop)
        self.resid_dropout2 = nn.Dropout(config.resid_pdrop)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        residual = self.resid_dropout1(states) + residual
        return self.ln_2(self.resid_dropout2(self.mlp(self.ln_1(residual))) + residual)


class SenseNetwork(nn.Module):
    """From words to their sense vectors."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.block = _Block(config)
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        width = config.sense_intermediate_scale * config.n_embd
        self.final_mlp = _FeedForward(config, width, config.n_embd * config.num_senses)

    def forward(self, embedded: Tensor) -> Tensor:
        """(texts, senses, tokens, width) of (texts, tokens, width) embeddings."""
        residual = self.dropout(embedded)
        senses = self.final_mlp(self.block(self.ln(residual), residual))
        return senses.unflatten(-1, (self.num_senses, -1)).transpose(1, 2)


class SenseWeights(nn.Module):
    """From a text's states to the weight that each position gives to each sense of each word before it."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        self.width = config.n_embd // config.num_senses
        self.c_attn = nn.Linear(config.n_embd, 2 * config.num_senses * self.width)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """(texts, senses, tokens, tokens) weights, which sum to 1 over the words that a position sees.

        Args:
            states: (texts, tokens, width).
            mask: (texts, tokens) 1 for words, 0 for padding.
        """
        both = self.c_attn(states).unflatten(-1, (2, self.num_senses, self.width))
        query, key = both.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.width)
        length = scores.shape[-1]
        seen = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            seen = seen & mask.bool()[:, None, None, :]
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1)


class SenseChanges(nn.Module):
    """What is added to single senses of single words."""

    places: Tensor

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.num_senses = config.num_senses
        # A sense is numbered token * num_senses + sense; the numbers ascend.
        self.register_buffer("places", torch.zeros(config.changed_senses, dtype=torch.long))
        self.vectors = nn.Parameter(torch.zeros(config.changed_senses, config.n_embd))

    def forward(self, tokens: Tensor) -> Tensor:
        """(texts, senses, tokens, width) to be added, zero for senses that are not changed."""
        numbers = tokens[:, None, :] * self.num_senses
        numbers = numbers + torch.arange(self.num_senses, device=tokens.device)[None, :, None]
        found = torch.searchsorted(self.places, numbers).clamp(max=len(self.places) - 1)
        return self.vectors[found] * (self.places[found] == numbers)[..., None]

    def listed(self) -> list[Sense]:
        """Which senses are changed, in the order of their vectors."""
        return [divmod(int(number), self.num_senses) for number in self.places.tolist()]


class BackpackModel(nn.Module):
    """Senses, and a GPT-2 that weighs them."""

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__()
        self.gpt2_model = GPT2Model(config)
        self.sense_network = SenseNetwork(config)
        self.sense_weight_net = SenseWeights(config)
        self.sense_changes = SenseChanges(config) if config.changed_senses else None

    def senses(self, tokens: Tensor) -> Tensor:
        """(texts, senses, tokens, width) the sense vectors of each word, whatever stands around it."""
        senses = self.sense_network(self.gpt2_model.wte(tokens))
        return senses if self.sense_changes is None else senses + self.sense_changes(tokens)

    def weights(
        self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """(texts, senses, tokens, tokens) the weight of each word's sense at each position."""
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        states = self.gpt2_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.sense_weight_net(states, mask)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """(texts, tokens, width) the weighted sum of senses at each position."""
        return (self.weights(tokens, mask, positions) @ self.senses(tokens)).sum(dim=1)


class BackpackForCausalLM(GPT2PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """o_i = sum over senses l and words j <= i of alpha_lij c(x_j)_l; logits = E o_i.

    The senses c(x) in R^(k x d) are a map of the word's embedding alone, so each one's contribution to the
    logits is the same in any text up to the weight alpha_l = softmax(q_l k_l / sqrt(d / k)), which comes
    from a GPT-2. It generates without a cache. It loads in plain transformers once
    `germane.core.backpack` has been imported.

    Differs from the hub's class: padding is masked, which it does not know; `sense_changes` are part of the
    model. Its file may have the embeddings twice more, as `word_embeddings` and `position_embeddings`.
    """

    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _tied_weights_keys = {"lm_head.weight": "backpack.gpt2_model.wte.weight"}
    _keys_to_ignore_on_load_unexpected = [
        r"backpack\.(word|position)_embeddings\.weight", r"\.attn\.(masked_)?bias$",
    ]  # fmt: skip

    def __init__(self, config: BackpackConfig) -> None:
        super().__init__(config)
        self.backpack = BackpackModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.backpack.gpt2_model.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put others in their place."""
        self.backpack.gpt2_model.wte = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits (texts, tokens, vocabulary), and the mean loss of the labels, each seen from before it."""
        logits = self.lm_head(self.backpack(input_ids, attention_mask, position_ids))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """The whole text at every step, since nothing is cached."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def change_senses(self, senses: Sequence[Sense]) -> SenseChanges:
        """Room for changes of these senses beside those that are changed already; what is new is zero."""
        known = self.backpack.sense_changes
        kept = dict(zip(known.listed(), known.vectors.detach(), strict=True)) if known is not None else {}
        places = sorted({*senses, *kept})
        self.config.changed_senses = len(places)
        changes = SenseChanges(self.config).to(self.lm_head.weight)
        numbers = [token * self.config.num_senses + sense for token, sense in places]
        changes.places = torch.tensor(numbers, device=self.device)
        with torch.no_grad():
            for row, place in enumerate(places):
                if place in kept:
                    changes.vectors[row] = kept[place]
        self.backpack.sense_changes = changes
        return changes

    def forget_changes(self) -> None:
        """The senses as they were trained."""
        self.config.changed_senses = 0
        self.backpack.sense_changes = None


AutoConfig.register(BackpackConfig.model_type, BackpackConfig, exist_ok=True)
AutoModelForCausalLM.register(BackpackConfig, BackpackForCausalLM, exist_ok=True)
