"""Tiny real models with random weights, and what the tests do with them again and again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GERMANE_QUIET", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from germane.recipe import Result, run_task

torch.set_num_threads(1)  # the models are tiny; threads would only wait for each other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [f"w{n}" for n in range(60)]
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

Weights = dict[str, torch.Tensor]


def tokenizer(words: Sequence[str] = WORDS) -> transformers.PreTrainedTokenizerFast:
    """Whole words, numbered in order."""
    vocabulary = {word: n for n, word in enumerate([*SPECIALS, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [SEP] $B", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **{
            **SIZE,
            "vocab_size": 64,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 0,
            **changes,
        }
    )


def bert_config(**changes: Any) -> transformers.BertConfig:
    return transformers.BertConfig(**{**SIZE, "vocab_size": 64, "max_position_embeddings": 64, **changes})


def gpt2_config() -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
    )


def t5_config() -> transformers.T5Config:
    return transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)


def vit_config(**changes: Any) -> transformers.ViTConfig:
    return transformers.ViTConfig(**{**SIZE, "image_size": 8, "patch_size": 4, **changes})


def perturb(model: Any, seed: int, size: float) -> Any:
    """Add noise to every parameter, relative to the spread usual for it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def make(kind: type, config: Any, seed: int = 0) -> Any:
    """A model whose norms and biases look trained."""
    torch.manual_seed(seed)
    return perturb(kind(config), seed + 1000, 0.05).eval()


def save(
    model: Any, folder: Path, dtype: Any = torch.float32, shard: str = "5GB", words: Any = WORDS
) -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    model.float()
    if words is not None:
        tokenizer(words).save_pretrained(folder)
    return folder


def vary(base: Path, folder: Path, seed: int, size: float = 0.01, **options: Any) -> Path:
    """A member: the base with a little noise."""
    kind = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(base, dtype=torch.float32)
    return save(perturb(model, seed, size), folder, **options)


def weights(folder: Path) -> Weights:
    """Every tensor of a checkpoint."""
    found: Weights = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, change: Any) -> None:
    """Change a checkpoint of one file: `change` gets the tensors and may edit them."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})


def same_bytes(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and torch.equal(
            one[n].contiguous().view(-1).view(torch.uint8), other[n].contiguous().view(-1).view(torch.uint8)
        )
        for n in one
    )


def distance(one: Weights, other: Weights) -> float:
    """Largest difference of any element."""
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one)


def total_change(one: Weights, other: Weights) -> float:
    return sum(float((one[n].double() - other[n].double()).square().sum()) for n in one) ** 0.5


def digest(folders: Iterable[Path]) -> str:
    """One digest of all files."""
    state = hashlib.sha256()
    for folder in folders:
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                state.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return state.hexdigest()


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def merge(
    method: str,
    base: Path,
    pool: Sequence[Path | str],
    out: Path,
    *,
    data: Sequence[Any] = (),
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
    **arguments: Any,
) -> Result:
    """`germane merge`, as the verbs of the package call it."""
    arguments = {"base": str(base), "pool": [str(path) for path in pool], "data": list(data), **arguments}
    return run_task(
        "merge",
        method.removeprefix("merge/"),
        arguments,
        settings or {},
        out,
        seed=seed,
        overwrite=overwrite,
    )


def train_language(model: Any, rows: list[dict[str, Any]], steps: int) -> Any:
    """Fit a causal language model to a few texts."""
    tokens = torch.tensor([tokenizer()(row["text"])["input_ids"] for row in rows])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
    return model.eval()


def train_classifier(model: Any, rows: list[dict[str, Any]], steps: int) -> Any:
    batch = tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([int(row["label"]) for row in rows])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        optimiser.step()
    return model.eval()


def language_rows(step: int, n: int = 12) -> list[dict[str, Any]]:
    """Texts that count up the words by `step`."""
    return [{"text": " ".join(WORDS[(start * 5 + step * k) % 60] for k in range(8))} for start in range(n)]


def class_rows(labels: int, n: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """The label is the first word's number modulo `labels`."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        words = torch.randint(0, 60, (5,), generator=generator).tolist()
        rows.append({"text": " ".join(WORDS[w] for w in words), "label": words[0] % labels})
    return rows


def language_loss(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Cross-entropy of a causal language model, worked out by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer()(row["text"])["input_ids"] + [3] for row in rows])
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)
