"""Set-Based Prompting (arXiv:2406.06581): options that are read as a set answer the same in every order.

SmolLM2-135M-Instruct is asked of 50 newsgroup posts which of four groups they are from, with the options in
all 24 orders, as usual and as a set. Baselines that must fail: plain prompting, and each half of the method
alone: the mask without the positions, the positions without the mask.

    python claims/set_based_prompting.py

Takes about a quarter of an hour on one core; ten questions at a time are kept in the cache, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import torch

from germane.attention import Attending, Prompt
from germane.claims import write_section
from germane.core.chat import load_language_model
from germane.core.evidence import Score
from germane.core.records import Row, write_jsonl
from germane.embedded import cache_folder, smollm2, texts
from germane.recipe import run_task
from germane.solver import Question
from germane.tasks.attend._task import Answered, scores_of
from germane.tasks.attend.set_based_prompting import SetBasedPrompting

OUT = cache_folder() / "claims" / "set_based_prompting"
BAR = 1e-4  # largest difference between orders that rounding may make
QUESTIONS, PART, WORDS = 50, 10, 12
LOOKED_AT = 4  # questions whose logits are compared over the whole vocabulary, in every way
GROUPS = {
    "rec.sport.hockey": "hockey", "rec.motorcycles": "motorcycles", "soc.religion.christian": "Christianity",
    "rec.sport.baseball": "baseball", "sci.crypt": "encryption", "rec.autos": "cars", "sci.med": "medicine",
    "sci.space": "space", "sci.electronics": "electronics", "misc.forsale": "things for sale",
    "comp.graphics": "computer graphics", "talk.politics.guns": "guns",
}  # fmt: skip
FORM = 'Post: "{question}"\nWhich topic is the post about?'
WAYS = {
    "as a set": SetBasedPrompting(),
    "mask only": SetBasedPrompting(positions=False),
    "positions only": SetBasedPrompting(mask=False),
    "as usual": SetBasedPrompting(mask=False, positions=False),
}


def main() -> None:
    rows = questions()
    answered: dict[str, list[Answered]] = {"base": [], "result": []}
    for start in range(0, QUESTIONS, PART):
        for subject, found in ask(rows[start : start + PART], OUT / str(start)).items():
            answered[subject] += found
    scores = {
        subject: {score.metric: score for score in scores_of(found, subject, "newsgroups")}
        for subject, found in answered.items()
    }
    largest = {subject: max(found.spread for found in group) for subject, group in answered.items()}
    moved = moved_logits(rows[:LOOKED_AT])
    body = f"{INTRODUCTION}\n\n{table(scores)}\n\n{moved_table(moved)}"
    write_section(
        "set_based_prompting", "Set-Based Prompting: the order of options cannot matter", body,
        verdict(scores, largest, moved),
    )  # fmt: skip


def questions() -> list[Row]:
    """Beginnings of posts, each with the topic of its group and those of three others."""
    generator = random.Random(0)
    posts = [row for row in texts("20newsgroups-test") if row["Category"] in GROUPS]
    rows = []
    for post in generator.sample(posts, QUESTIONS):
        right = GROUPS[post["Category"]]
        others = generator.sample([name for name in GROUPS.values() if name != right], 3)
        options = generator.sample([right, *others], 4)
        text = " ".join(post["Text"].split()[:WORDS])
        rows.append({"question": text, "options": options, "answer": right})
    return rows


def ask(rows: list[Row], folder: Path) -> dict[str, list[Answered]]:
    """Answers in all orders, of the model as usual and with the method."""
    if not folder.exists():
        file = folder.with_suffix(".jsonl")
        write_jsonl(rows, file)
        arguments = {"model": str(smollm2()), "questions": str(file), "question_form": FORM}
        run_task("attend", "set-based-prompting", arguments, {}, folder)
    return {subject: read(folder / f"items-{subject}.jsonl") for subject in ("base", "result")}


def read(file: Path) -> list[Answered]:
    items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Answered(
            Question("", item["question"], tuple(item["answer"]), tuple(item["options"])),
            [tuple(order) for order in item["orders"]],
            item["scores"],
        )
        for item in items
    ]


def moved_logits(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Of each way of reading, of each question, the largest change of any next token's logit with order."""
    file = OUT / "logits.json"
    if not file.exists():
        model, tokenizer = load_language_model(str(smollm2()), torch.float32)
        found = {
            name: [moved(Attending(model, tokenizer, way.arrange), row) for row in rows]
            for name, way in WAYS.items()
        }
        file.write_text(json.dumps(found), encoding="utf-8")
    kept: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
    return kept


def moved(attending: Attending, row: Row) -> float:
    shown = [f"\n- {option}" for option in row["options"]]
    prompts: list[Prompt] = [
        [FORM.replace("{question}", row["question"]), list(order), "\nAnswer:"]
        for order in permutations(shown)
    ]
    last = torch.stack([logits[-1] for logits in attending.logits(prompts)])
    return float((last.amax(0) - last.amin(0)).max())


def table(scores: dict[str, dict[str, Score]]) -> str:
    names = {"base": "as usual", "result": "as a set"}
    metrics = list(scores["base"])
    lines = [f"| read | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for subject, name in names.items():
        cells = [cell(scores[subject][metric]) for metric in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(score: Score) -> str:
    if "nats" in score.metric:
        return f"{score.value:.2g} ({score.low:.2g} to {score.high:.2g})"
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"


def moved_table(moved: dict[str, list[float]]) -> str:
    lines = ["| read | least change of a question's logits with order | largest |", "|---|---|---|"]
    lines += [f"| {name} | {min(values):.2g} | {max(values):.2g} |" for name, values in moved.items()]
    return "\n".join(lines)


def verdict(
    scores: dict[str, dict[str, Score]], largest: dict[str, float], moved: dict[str, list[float]]
) -> str:
    """Order has no effect on a set, has one otherwise, and the set is right between worst and best order."""
    usual, as_set = scores["base"], scores["result"]
    same = largest["result"] <= BAR and max(moved["as a set"]) <= BAR
    others_move = all(min(values) > 100 * BAR for name, values in moved.items() if name != "as a set")
    worst, mean, best = (
        usual[name].value for name in ("accuracy, worst order", "accuracy", "accuracy, best order")
    )
    between = worst <= as_set["accuracy"].value <= best
    changed = round(usual["answers that change with order"].value * QUESTIONS)
    state = "Holds" if same and others_move and between else "Does not hold on this model"
    return (
        f"{state}: over 24 orders of 50 questions, order moves the log-probability of an option by at most "
        f"{largest['result']:.1g} nats as a set and by up to {largest['base']:.2g} as usual, where "
        f"{changed} of {QUESTIONS} answers change; any logit of the next token by at most "
        f"{max(moved['as a set']):.1g}, with one half of the method alone by "
        f"{min(min(moved[name]) for name in ('mask only', 'positions only')):.2g} at least. Right as a set "
        f"{as_set['accuracy'].value:.2f}, as usual {worst:.2f} in every order, {mean:.2f} on average, "
        f"{best:.2f} in some order."
    )


INTRODUCTION = f"""\
SmolLM2-135M-Instruct (a file quantised to 4 bits, read in float32), the first {WORDS} words of {QUESTIONS} posts of
20 Newsgroups (test part), four topics each, all 24 orders; the answer is the option with the highest mean
log-probability of a token. Worst and best order are of each question: right in every order, and in some order.
Shares with 95 % Wilson intervals, means over questions with bootstrap ones. Logits of the next token over the whole
vocabulary, of the first {LOOKED_AT} questions. One model, one form of prompt: accuracies say nothing of others."""


if __name__ == "__main__":
    main()
