"""A sequence classifier with a second head, one for every token: opened, saved, and its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from germane.core.checkpoint import SINGLE, Checkpoint, read_json, save_tensors
from germane.core.errors import CheckpointError
from germane.embedded import model_folder
from germane.tasks.ground._ranker import is_classifier

HEAD = "token_classifier"  # as published checkpoints call it
IGNORED = -100  # label of tokens that the loss leaves out
_PUBLISHED = ("DebertaV2ForSequenceClassification", "DebertaV2Config", "deberta.")


class TwoHeads(nn.Module):
    """A sequence classifier of transformers, and a token head on the last states of its encoder.

    Args:
        ranker: Its first logit is the passage's score.
    """

    def __init__(self, ranker: Any) -> None:
        super().__init__()
        self.ranker = ranker
        config = ranker.config
        rates = (getattr(config, name, None) for name in ("cls_dropout", "hidden_dropout_prob"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.0))
        self.token_classifier = nn.Linear(config.hidden_size, 2)
        self._states: list[Tensor] = []
        ranker.base_model.register_forward_hook(lambda module, given, found: self._states.append(found[0]))

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor]:
        """(pairs,) scores and (pairs, tokens, 2) logits: dropped, kept."""
        self._states.clear()
        scores = self.ranker(**batch).logits[:, 0]
        return scores, self.token_classifier(self.dropout(self._states.pop()))

    def save(self, folder: Path) -> None:
        """Write configuration and weights, so that the folder is one of the classifier, too."""
        folder.mkdir(parents=True, exist_ok=True)
        self.ranker.config.architectures = [type(self.ranker).__name__]
        self.ranker.config.save_pretrained(folder)
        head = {f"{HEAD}.{name}": value for name, value in self.token_classifier.state_dict().items()}
        tensors = {**self.ranker.state_dict(), **head}
        save_tensors({name: value.cpu() for name, value in tensors.items()}, folder / SINGLE)


def losses(scores: Tensor, logits: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the tokens, and squared distance from the teacher's scores.

    Args:
        scores: (pairs,)
        logits: (pairs, tokens, 2)
        labels: (pairs, tokens) 1: kept, 0: dropped, `IGNORED`: left out.
        targets: (pairs,) the teacher's scores; NaN: left out.

    Returns:
        Two means; 0 where nothing is left to take the mean of.
    """
    known, counted = ~targets.isnan(), bool((labels != IGNORED).any())
    flat = logits.reshape(-1, 2)
    pruning = functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED)
    ranking = functional.mse_loss(scores[known], targets[known])
    return pruning if counted else flat.sum() * 0, ranking if known.any() else scores.sum() * 0


def is_pruner(folder: Path) -> bool:
    """Whether a model folder has a token head."""
    return f"{HEAD}.weight" in Checkpoint(folder).tensors


def is_published(folder: Path) -> bool:
    """Whether it is a pruner as its authors publish it, with code of its own."""
    return "Provence" in (read_json(folder / "config.json").get("architectures") or [])


def require_pruner(name: str) -> None:
    """Refuse a model without a token head."""
    if not is_pruner(model_folder(name)):
        raise CheckpointError(
            f"{name}: has no {HEAD}, so it cannot prune: train it with labelled records, or name a pruner."
        )


def load(folder: Path) -> TwoHeads:
    """The model of a folder, its heads new where they are not there."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # germane shows its own, and only to a terminal
    checkpoint = Checkpoint(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of new heads
        if not is_pruner(folder):
            return TwoHeads(_new_ranker(folder))
        tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.tensors}
        head = {name: tensors.pop(f"{HEAD}.{name}") for name in ("weight", "bias")}
        model = TwoHeads(_saved_ranker(checkpoint, tensors))
    model.token_classifier.load_state_dict(head)
    return model


def _new_ranker(folder: Path) -> Any:
    """A cross-encoder, or an encoder with a new head."""
    from transformers import AutoModelForSequenceClassification

    outputs: dict[str, Any] = {} if is_classifier(folder) else {"num_labels": 1}
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **outputs)


def _saved_ranker(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Any:
    """The classifier that a pruner is made of; published ones are known by their tensors' names."""
    import transformers

    kind, configuration, prefix = _PUBLISHED
    names = checkpoint.config.get("architectures") or [""]
    if str(names[0]).endswith("ForSequenceClassification") and hasattr(transformers, names[0]):
        kind = names[0]
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    elif any(name.startswith(prefix) for name in tensors):
        known = {"model_type", "auto_map", "architectures"}
        fields = {name: value for name, value in checkpoint.config.items() if name not in known}
        config = getattr(transformers, configuration).from_dict(fields)
    else:
        raise CheckpointError(
            f"{checkpoint.folder}: is a pruner of an unknown kind, {names[0]}: germane opens those that it "
            "wrote and those on DeBERTa-v3, such as naver/provence-reranker-debertav3-v1."
        )
    model, report = getattr(transformers, kind).from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.folder}: lacks {sorted(report['missing_keys'])[0]!r}, which would be random; "
            "save the whole model again."
        )
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, also where transformers does not know the kind of model."""
    from transformers import CONFIG_MAPPING, AutoTokenizer, DebertaV2TokenizerFast

    known = read_json(folder / "config.json").get("model_type") in CONFIG_MAPPING
    try:
        return (AutoTokenizer if known else DebertaV2TokenizerFast).from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder}: has no tokenizer: {reason}") from None
