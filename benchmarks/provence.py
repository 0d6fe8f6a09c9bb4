"""What pruning costs beside reranking: one pass with two heads against the ranking head alone.

    python benchmarks/provence.py

A DeBERTa of the size of DeBERTa-v3-base reads questions with passages: as the pruner of
ground/provence, sentences split and probabilities of every token included, and as a CrossEncoder of
sentence-transformers on the same folder. Its weights are random, which does not change the time. Both
do so in one process, taking turns; the ratio is that of the fastest runs, with the range of the ratios of
neighbouring ones beside. The scores must be the same. The table goes to standard output and, as JSON,
to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from germane.core.device import device
from germane.embedded import minilm, texts
from germane.solver import Passage
from germane.tasks.ground._pruner import Pruner, Text

RESULT = Path(__file__).parent / "results" / "provence.json"
BAR = 1.1  # times as long as reranking alone
WORDS = (9, 14, 20, 27)  # of a sentence, in turn
SENTENCES = (4, 6, 8)  # of a passage, in turn
BATCH = 32  # pairs at a time, of the cross-encoder
SIZES = {"base": (768, 12, 12), "tiny": (64, 2, 2)}  # width, layers, heads


def make_pruner(folder: Path, size: str) -> None:
    """A pruner with random weights, which is a cross-encoder, too."""
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    width, layers, heads = SIZES[size]
    config = DebertaV2Config(
        vocab_size=len(tokenizer), num_labels=1, relative_attention=True, position_buckets=256,
        pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0,
        position_biased_input=False, max_position_embeddings=512, pooler_hidden_act="gelu",
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        pooler_hidden_size=width,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=10.0)  # scores that are apart
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Pruner(str(folder), trained=True).save(folder)


def pairs(count: int) -> list[tuple[str, Passage]]:
    """Questions and passages of posts, whose words are put into sentences of mixed length."""
    needed = max(WORDS) * max(SENTENCES)
    rows = [row["Text"].split() for row in texts("20newsgroups-train")]
    found = []
    for number, words in enumerate([words for words in rows if len(words) >= needed][:count]):
        place, sentences = 8, []
        for sentence in range(SENTENCES[number % len(SENTENCES)]):
            length = WORDS[(number + sentence) % len(WORDS)]
            sentences.append(" ".join(words[place : place + length]).capitalize() + ".")
            place += length
        found.append((f"{' '.join(words[:8])}?", Passage(str(number), " ".join(sentences))))
    return found


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and what came of them."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=64, help="how many questions with a passage")
    parser.add_argument("--size", choices=SIZES, default="base", help="of the encoder")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the fastest counts")
    parser.add_argument("--dry", action="store_true", help="write no file")
    given = parser.parse_args()
    from sentence_transformers import CrossEncoder

    asked = pairs(given.pairs)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        make_pruner(Path(folder), given.size)
        pruner, reranker = Pruner(folder), CrossEncoder(folder, device=str(device()))

        def both() -> list[float]:
            return [read.score for read in pruner([(text, Text.of(passage)) for text, passage in asked])]

        def alone() -> list[float]:
            read = [(text, passage.text) for text, passage in asked]
            scores = reranker.predict(read, batch_size=BATCH, activation_fn=torch.nn.Identity())
            return [float(score) for score in scores]

        same = max(abs(a - b) for a, b in zip(both(), alone(), strict=True))  # and the warm-up
        runs = [(clock(both)[0], clock(alone)[0]) for _ in range(given.repeats)]
    fastest = [min(run[way] for run in runs) for way in (0, 1)]
    ratios = sorted(one / other for one, other in runs)
    ratio = fastest[0] / fastest[1]
    print("| way | seconds |\n|---|---|")
    print(f"| pruning and reranking | {fastest[0]:.2f} |\n| reranking alone | {fastest[1]:.2f} |")
    print(f"\nratio {ratio:.3f} (runs {ratios[0]:.3f} to {ratios[-1]:.3f}); bar {BAR}")
    print(f"scores differ by {same:.1e} at most")
    if same > 1e-4:
        raise SystemExit("the two ways do not give the same scores: they do not read the same")
    result = {
        "pairs": len(asked), "size": given.size, "repeats": given.repeats, "device": str(device()),
        "threads": torch.get_num_threads(), "load_before": round(load, 1), "bar": BAR,
        "seconds": {"both": round(fastest[0], 3), "alone": round(fastest[1], 3)},
        "ratio": round(ratio, 3), "ratios": [round(each, 3) for each in ratios], "scores_differ_by": same,
    }  # fmt: skip
    if not given.dry:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
