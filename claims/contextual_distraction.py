"""Contextual distraction (arXiv:2502.01609): sentences that leave the answer make a model miss it.

SmolLM2-135M-Instruct, by the likelihood of options, on 40 easy questions with three options that it answers
rightly. Instead of a generator a bank of sentences: fixed templates with a word that MiniLM finds near the
wrong option. Baselines that must fail: as many sentences with unrelated words, and neutral padding. Beside
them: the order of the options alone, and the same search with unrelated words.

    python claims/contextual_distraction.py

Takes about ten minutes on one core; every answer is kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from germane.claims import interval, write_section
from germane.core.answers import contains, words
from germane.core.chat import Call, ChatModel, ChatSettings, Continuation, Conversation, Reply
from germane.core.chat_cache import CachedChat
from germane.core.embedding import Encoder
from germane.core.local_chat import LocalChat
from germane.embedded import cache_folder, minilm, smollm2, texts
from germane.solver import Question, chosen_option
from germane.tasks.synthesize.contextual_distraction import (
    DISTRACTED,
    ContextualDistraction,
    Models,
    Tree,
    check_prompt,
    verdict,
)

OUT = cache_folder() / "claims" / "contextual_distraction"
SEEDS = (0, 1, 2)
QUESTIONS, NEAREST, VOCABULARY, PLANTED = 40, 8, 3000, 20
BAR = 60.0  # highest accuracy in percent after the search
METHOD = ContextualDistraction(max_good=1)
TEMPLATES = (
    "People often speak of {word} when this comes up.", "Someone in the room was reading about {word}.",
    "There is also much to be said about {word}.", "Last week there was a talk on {word}.",
    "Many who hear this think of {word} first.",
)  # fmt: skip
PADDING = (
    "Please take your time and read this carefully.", "This is one of several questions of this kind.",
    "Some people find questions like this one easy.", "The next question will be shown after this one.",
    "There is enough time to think about everything.",
)  # fmt: skip
FORMS = {
    "What is the capital of {key}?": {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
        "China": "Beijing", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon",
        "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
        "Norway": "Oslo", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
        "Belgium": "Brussels", "Canada": "Ottawa", "Thailand": "Bangkok", "Cuba": "Havana", "Kenya": "Nairobi",
        "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "Nepal": "Kathmandu", "Peru": "Lima",
    },
    "What is the opposite of {key}?": {
        "hot": "cold", "big": "small", "day": "night", "early": "late", "full": "empty", "happy": "sad",
        "hard": "soft", "high": "low", "left": "right", "light": "dark", "long": "short", "loud": "quiet",
        "new": "old", "open": "closed", "rich": "poor", "strong": "weak", "sweet": "sour", "up": "down",
        "war": "peace", "wet": "dry", "win": "lose", "love": "hate", "true": "false", "begin": "end",
    },
    "What is a young {key} called?": {
        "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "goat": "kid",
        "bear": "cub", "duck": "duckling", "goose": "gosling", "pig": "piglet", "frog": "tadpole",
        "chicken": "chick", "deer": "fawn", "kangaroo": "joey", "eagle": "eaglet", "swan": "cygnet",
    },
    "Who works with {key} most of the time?": {
        "bread": "a baker", "teeth": "a dentist", "patients": "a doctor", "pupils": "a teacher",
        "pipes": "a plumber", "fish": "a fisherman", "flowers": "a florist", "meat": "a butcher",
        "paint and canvas": "a painter", "crops": "a farmer", "laws": "a lawyer", "planes": "a pilot",
        "ships": "a sailor", "fires": "a firefighter", "books to lend": "a librarian", "hair": "a barber",
        "wood": "a carpenter", "songs": "a singer", "recipes": "a cook", "letters": "a postman",
    },
}  # fmt: skip
Write = Callable[[str, str, str, random.Random], str]  # question, right answer, idea -> a sentence


@dataclass
class Ruled(ChatModel):
    """Answers by a rule, which sees what the last message says and a generator of its own."""

    rule: Callable[[str, random.Random], str]
    name: str = "rule"
    calls: list[Call] = field(default_factory=list)

    def fingerprint(self) -> str:
        return self.name

    def answer_each(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> Iterator[tuple[int, Reply]]:
        seed = settings.seed if settings else 0
        for number, messages in enumerate(conversations):
            text = messages[-1]["content"]
            yield number, Reply(self.rule(text, random.Random(f"{seed}/{text}")), "stop", 0, 0, 0.0)

    def log_probabilities(self, *_: Any) -> list[Continuation]:
        raise NotImplementedError

    def option_log_probabilities(self, *_: Any) -> list[dict[str, float]]:
        raise NotImplementedError


class Bank:
    """Sentences with words that are near an option, or near none."""

    @cached_property
    def vocabulary(self) -> list[str]:
        """Frequent words of a newspaper and of a forum."""
        counts: Counter[str] = Counter()
        for corpus in ("reuters-r8-train", "20newsgroups-train"):
            for row in texts(corpus):
                counts.update(
                    set(re.findall(r"\b[a-z]{4,}\b", str(row.get("Text") or row.get("Content") or "")))
                )
        content = [word for word, _ in counts.most_common() if word not in ENGLISH_STOP_WORDS]
        return content[:VOCABULARY]

    @cached_property
    def vectors(self) -> np.ndarray:
        return self.encode(self.vocabulary).numpy()

    @cached_property
    def encode(self) -> Encoder:
        return Encoder(minilm())

    @cached_property
    def known(self) -> dict[str, list[int]]:
        """Option -> numbers of the words, nearest first; asked for once each."""
        options = sorted({answer for form in FORMS.values() for answer in form.values()})
        cosines = self.encode(options).numpy() @ self.vectors.T
        return {option: np.argsort(-row).tolist() for option, row in zip(options, cosines, strict=True)}

    def near(self, text: str, gold: str, idea: str, generator: random.Random) -> str:
        """A sentence with one of the words nearest to the wrong option."""
        allowed = [
            word for word in self._words(idea) if not any(map(alike(word), words(f"{gold} {idea} {text}")))
        ]
        return generator.choice(TEMPLATES).format(word=generator.choice(allowed[:NEAREST]))

    def far(self, text: str, gold: str, idea: str, generator: random.Random) -> str:
        """A sentence with a word from the farther half, of the wrong option and of the right one."""
        half = VOCABULARY // 2
        allowed = sorted(set(self._words(idea)[half:]) & set(self._words(gold)[half:]))
        return generator.choice(TEMPLATES).format(word=generator.choice(allowed))

    def _words(self, option: str) -> list[str]:
        return [self.vocabulary[number] for number in self.known[option]]


def padding(text: str, gold: str, idea: str, generator: random.Random) -> str:
    return generator.choice(PADDING)


def alike(word: str) -> Callable[[str], bool]:
    """Whether another word begins like this one, as plurals and derived words do."""
    return lambda other: word[:4] == other[:4]


def writer(write: Write) -> Ruled:
    """A generator that takes its sentences from a bank."""

    def rule(prompt: str, generator: random.Random) -> str:
        shown = json.loads(prompt.split("\n\n")[1])
        return write(shown["question"], shown["right answer"], shown["idea"], generator)

    return Ruled(rule)


def keeps_answer(prompt: str, generator: random.Random) -> str:
    """A checker by rule: what is added names no option, and does not speak of the answer or deny."""
    shown = json.loads(prompt.split("\n\n")[1])
    before, _, after = shown["question with text added"].partition(shown["question"])
    added = f"{before} {after}"
    named = any(contains(added, option) for option in shown["options"])
    return "no" if named or re.search(r"\b(answer|not|never|wrong|right)\b", added) else "yes"


def main() -> None:
    target = CachedChat(LocalChat.load(str(smollm2())), OUT / "answers.sqlite3")
    found = measure(target, known_questions(target), SEEDS)
    checked = planted(target)
    body = f"{INTRODUCTION}\n\n{table(found)}\n\n{checks(checked)}"
    write_section(
        "contextual_distraction", "Contextual distraction: sentences beside a question cost its answer", body,
        conclusion(found, checked),
    )  # fmt: skip


def questions() -> list[Question]:
    """All questions, the wrong options drawn from the same form's answers, forms in turn."""
    generator = random.Random(0)
    made = []
    for form, pairs in FORMS.items():
        for key, answer in pairs.items():
            others = generator.sample([other for other in pairs.values() if other != answer], 2)
            options = tuple(generator.sample([answer, *others], 3))
            made.append(Question(key, form.format(key=key), (answer,), options))
    return generator.sample(made, len(made))


def known_questions(target: ChatModel, count: int = QUESTIONS) -> list[Question]:
    """The first so many questions that the model answers rightly."""
    asked = questions()
    choices = METHOD.choose(target, asked, chosen_option)
    right = [q for q, choice in zip(asked, choices, strict=True) if q.answers[0] in choice.picks]
    return right[:count]


def measure(target: ChatModel, asked: list[Question], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Accuracy in percent under each condition, a number a seed."""
    bank = Bank()
    checker = Ruled(keeps_answer)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for seed in seeds:
        trees = METHOD.search(asked, Models(target, writer(bank.near), checker), seed)
        note(SEARCH, survivors(trees))
        for limit in (1, 3):
            note(f"of it, after {limit} expansion{'s' if limit > 1 else ''}", survivors(trees, limit))
        note(ORDER, accuracy(target, [reordered(tree) for tree in trees]))
        for name, write in ((FAR, bank.far), (PADDED, padding)):
            note(name, accuracy(target, [beside(tree, write, seed) for tree in trees]))
        if seed == seeds[0]:
            trees = METHOD.search(asked, Models(target, writer(bank.far), checker), seed)
            note(FAR_SEARCH, survivors(trees))
    return found


def survivors(trees: Sequence[Tree], limit: int = METHOD.max_try) -> float:
    """Percent of the questions that are not distracted within so many expansions."""
    lost = sum(tree.result == DISTRACTED and tree.expansions <= limit for tree in trees)
    return 100 * (1 - lost / len(trees))


def accuracy(target: ChatModel, asked: Sequence[Question]) -> float:
    choices = METHOD.choose(target, asked, chosen_option)
    right = sum(q.answers[0] in choice.picks for q, choice in zip(asked, choices, strict=True))
    return 100 * right / len(asked)


def last(tree: Tree) -> Question:
    """The distraction, or of a question that survived, the first child."""
    return (tree.found or tree.nodes[1:2] or [tree.root])[0].question


def reordered(tree: Tree) -> Question:
    return replace(tree.root.question, options=last(tree).options)


def beside(tree: Tree, write: Write, seed: int) -> Question:
    """As many other sentences as were added, in the same places, options in a random order."""
    root = tree.root.question
    generator = random.Random(f"{seed}/{root.id}")
    text = root.text
    for node in (tree.found or tree.nodes[1:2])[0].path[1:]:
        sentence = write(root.text, root.answers[0], node.towards, generator)
        text = f"{sentence} {text}" if node.place == "before" else f"{text} {sentence}"
    return replace(root, text=text, options=tuple(generator.sample(root.options, len(root.options))))


def planted(target: ChatModel) -> dict[str, tuple[int, int]]:
    """Of sentences that change the answer, and of those of the bank, how many each checker refuses."""
    bank, generator = Bank(), random.Random(0)
    asked = questions()[:PLANTED]
    wrong = [next(option for option in q.options if option != q.answers[0]) for q in asked]
    forms = (
        lambda q, idea: f"The answer is {idea}.",
        lambda q, idea: f"Here, {q.answers[0]} is not the right answer.",
    )
    changing = [
        f"{forms[n % 2](q, idea)} {q.text}" for n, (q, idea) in enumerate(zip(asked, wrong, strict=True))
    ]
    keeping = [
        f"{bank.near(q.text, q.answers[0], idea, generator)} {q.text}"
        for q, idea in zip(asked, wrong, strict=True)
    ]
    found = {}
    for name, checker in (("rule", Ruled(keeps_answer)), ("SmolLM2", target)):
        refused = []
        for those in (changing, keeping):
            prompts = [check_prompt(q, replace(q, text=text)) for q, text in zip(asked, those, strict=True)]
            replies = checker.answer(prompts, ChatSettings(max_tokens=16))
            refused.append(sum(verdict(reply.text) != "yes" for reply in replies))
        found[name] = (refused[0], refused[1])
    return found


def table(found: dict[str, list[float]]) -> str:
    lines = ["| asked | right, percent |", "|---|---|", "| as they are | 100.0 (chosen so) |"]
    return "\n".join([*lines, *(f"| {name} | {interval(values)} |" for name, values in found.items())])


def checks(found: dict[str, tuple[int, int]]) -> str:
    parts = [
        f"{name} refuses {changing} of {PLANTED} planted sentences that change the answer, and {keeping} of "
        f"{PLANTED} of the bank"
        for name, (changing, keeping) in found.items()
    ]
    return f"Checkers: {'; '.join(parts)}."


def conclusion(found: dict[str, list[float]], checked: dict[str, tuple[int, int]]) -> str:
    """Holds if the search halves what is right, and neither baseline loses half as much."""
    means = {name: float(np.mean(values)) for name, values in found.items()}
    drop = 100 - means[SEARCH]
    failed = all(100 - means[name] < drop / 2 for name in (FAR, PADDED))
    holds = means[SEARCH] <= BAR and failed and checked["rule"][0] == PLANTED
    by_content = 100 - means[FAR_SEARCH] < drop / 2
    content = "" if by_content else (
        " But that is not shown to be by what the sentences say: the same search with unrelated words leaves "
        f"{means[FAR_SEARCH]:.0f} (one seed)."
    )  # fmt: skip
    return (
        f"{'Holds' if holds else 'Does not hold'} on this model: of {QUESTIONS} questions answered rightly, "
        f"{interval(found[SEARCH])} percent are left after the search; {interval(found[FAR])} with as many "
        f"unrelated sentences, {interval(found[PADDED])} with padding, {interval(found[ORDER])} by the order "
        f"of the options alone.{content}"
    )


SEARCH, FAR_SEARCH = (
    "**after the search**, words near a wrong option",
    "the same search, unrelated words (one seed)",
)
ORDER = "options in the distracted order, no sentence"
FAR, PADDED = "as many sentences, unrelated words", "as many sentences, padding"
INTRODUCTION = f"""\
SmolLM2-135M-Instruct (a file quantised to 4 bits) chooses the option likeliest per token. {QUESTIONS} easy questions
of four forms with three options, the first that it answers rightly in the order given; at most {METHOD.max_try}
expansions, one distraction each. Sentences are fixed templates with one of the {NEAREST} words nearest to the wrong
option, of {VOCABULARY} frequent ones, by MiniLM, none of which begins like a word of the question, the option or
the answer; unrelated words are from the farther half. Mean and 95 % t interval over {len(SEEDS)} seeds of sentences,
places and orders. The best of many tries is compared with single ones: that is what a search is, and the last
row gives unrelated words as many tries."""


if __name__ == "__main__":
    main()
