"""Throughput of a local chat model, side by side with asking it one conversation at a time.

    python benchmarks/chat.py

SmolLM2-135M-Instruct (float32) answers 64 questions of mixed length, the likeliest token always: by
`generate` of transformers one at a time, and by `LocalChat` in batches of like lengths. Both do so in
one process, taking turns; of several repeats the fastest is reported. The answers must be the same. The
table goes to standard output and, as JSON, to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from germane.core.chat import ChatSettings, Conversation, encode_conversation, load_language_model
from germane.core.local_chat import LocalChat
from germane.embedded import smollm2, texts

RESULT = Path(__file__).parent / "results" / "chat.json"
BAR = 3.0  # times as fast as one at a time
WORDS = (8, 24, 60, 120)  # of a text, in turn


def conversations(count: int) -> list[Conversation]:
    """Requests about texts of mixed length."""
    rows = [row["Text"].split() for row in texts("20newsgroups-train")]
    long = [words for words in rows if len(words) >= max(WORDS)]
    cut = (" ".join(words[: WORDS[number % len(WORDS)]]) for number, words in enumerate(long[:count]))
    return [[{"role": "user", "content": f"What is this text about?\n\n{text}"}] for text in cut]


def singly(model: Any, tokenizer: Any, asked: list[Conversation], tokens: int) -> list[str]:
    """What one would write with transformers alone."""
    answers = []
    for messages in asked:
        prompt = torch.tensor([encode_conversation(tokenizer, messages)])
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
        )
        answers.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    return answers


def clock(work: Callable[[], list[str]]) -> tuple[float, list[str]]:
    """Seconds and what came of them."""
    start = time.perf_counter()
    answers = work()
    return time.perf_counter() - start, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=64, help="how many questions")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the fastest counts")
    parser.add_argument("--budgets", default="8192", help="comma-separated tokens at a time")
    parser.add_argument("--dry", action="store_true", help="write no file")
    given = parser.parse_args()
    model, tokenizer = load_language_model(str(smollm2()), dtype=torch.float32)
    asked = conversations(given.prompts)
    settings = ChatSettings(max_tokens=given.tokens)

    def batched(budget: int) -> list[str]:
        chat = LocalChat(model, tokenizer, "smollm2", batch_tokens=budget)
        return [reply.text for reply in chat.answer(asked, settings)]

    works: dict[str, Callable[[], list[str]]] = {
        "one at a time": lambda: singly(model, tokenizer, asked, given.tokens)
    }
    for budget in map(int, given.budgets.split(",")):
        works[f"{budget} tokens at a time"] = lambda budget=budget: batched(budget)
    load = os.getloadavg()[0]
    runs = [{name: clock(work) for name, work in works.items()} for _ in range(given.repeats)]
    plain = min(run["one at a time"][0] for run in runs)
    rows = {}
    print("| way | seconds | times as fast | same answers |\n|---|---|---|---|")
    for name in works:
        seconds = min(run[name][0] for run in runs)
        same = sum(a == b for a, b in zip(runs[0][name][1], runs[0]["one at a time"][1], strict=True))
        rows[name] = {
            "seconds": round(seconds, 2),
            "ratio": round(plain / seconds, 2),
            "same_answers": same,
        }
        print(f"| {name} | {seconds:.1f} | {plain / seconds:.2f} | {same} of {len(asked)} |")
    result = {
        "prompts": len(asked),
        "tokens": given.tokens,
        "threads": torch.get_num_threads(),
        "load_before": round(load, 1),
        "bar": BAR,
        "rows": rows,
    }
    if not given.dry:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
