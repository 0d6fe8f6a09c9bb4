"""Peak memory of unlearning by fine-tuning, side by side with plain training in transformers.

    python benchmarks/unlearn.py

Both sides train SmolLM2-135M-Instruct (float32, AdamW) for a few batches of 4 texts of 256 tokens,
each in a process of its own. germane's side is the whole of `germane unlearn --trials 0`: it also
checks its inputs, saves the model, and measures the untouched and the unlearned one. The table goes to
standard output and, as JSON, to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "unlearn.json"
BATCH, TOKENS, BATCHES = 4, 256, 4
METHODS: dict[str, dict[str, Any]] = {
    "gradient-ascent": {},
    "gradient-ascent, gdr": {"regulariser": "gdr"},
    "gradient-ascent, klr": {"regulariser": "klr"},
}


def texts() -> list[str]:
    """Texts of exactly as many tokens as a row holds."""
    from transformers import AutoTokenizer

    from germane.embedded import smollm2
    from germane.embedded import texts as corpus

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    words = " ".join(" ".join(row["Text"].split()) for row in corpus("20newsgroups-train")[:400])
    tokens = tokenizer(words)["input_ids"]
    parts = [tokens[start : start + TOKENS] for start in range(0, 2 * BATCH * BATCHES * TOKENS, TOKENS)]
    return [tokenizer.decode(part) for part in parts]


def train_plainly() -> None:
    """The batches, by what one would write with transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from germane.embedded import smollm2

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    rows = texts()[: BATCH * BATCHES]
    for first in range(0, len(rows), BATCH):
        batch = tokenizer(
            rows[first : first + BATCH],
            truncation=True,
            max_length=TOKENS,
            padding=True,
            return_tensors="pt",
        )
        (-model(**batch, labels=batch["input_ids"]).loss).backward()
        optimiser.step()
        optimiser.zero_grad()


def unlearn(name: str, folder: Path) -> None:
    """The same batches by `germane unlearn`."""
    from germane.core.records import write_jsonl
    from germane.embedded import smollm2
    from germane.recipe import run_task

    rows = [{"text": text} for text in texts()]
    forget, retain = rows[: BATCH * BATCHES], rows[BATCH * BATCHES :]
    data = {}
    for role, part in (("forget", forget), ("retain", retain)):
        write_jsonl(part, folder / f"{role}.jsonl")
        data[role] = {"name": role, "path": str(folder / f"{role}.jsonl"), "max_tokens": TOKENS}
    settings = {"epochs": 1, "batch_size": BATCH, "learning_rate": 1e-6, **METHODS[name]}
    run_task(
        "unlearn",
        name.split(",")[0],
        {"model": str(smollm2()), "trials": 0, **data},
        settings,
        folder / "out",
    )


def measure(name: str) -> dict[str, float]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--run", name]
    environment = {**os.environ, "GERMANE_QUIET": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(output.strip().split("\n")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", choices=["plain", *METHODS], help=argparse.SUPPRESS)
    chosen = parser.parse_args().run
    if chosen:
        with tempfile.TemporaryDirectory() as folder:
            if chosen == "plain":
                train_plainly()
            else:
                unlearn(chosen, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak_mebibytes": round(peak)}))
        return
    rows = {name: measure(name) for name in ("plain", *METHODS)}
    plain = rows["plain"]["peak_mebibytes"]
    print("| program | peak memory, MiB | times plain |\n|---|---|---|")
    for name, row in rows.items():
        row["times_plain"] = round(row["peak_mebibytes"] / plain, 2)
        print(f"| {name} | {row['peak_mebibytes']} | {row['times_plain']} |")
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
