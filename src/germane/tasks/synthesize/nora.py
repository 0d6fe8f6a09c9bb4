"""NoRa: demonstrations whose reasoning holds thoughts that are irrelevant or wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

from pydantic import Field

from germane.core.chat import ChatModel, ChatSettings
from germane.core.errors import RecordsError
from germane.core.evidence import Step, Table
from germane.core.records import Row
from germane.method import method
from germane.roles import Records
from germane.solver import Question, read_questions
from germane.tasks.synthesize._synthesizer import ORIGIN, Synthesizer

DEMONSTRATIONS = "demonstrations"
FILLED, GIVEN, WRITTEN = "filled into a template", "given", "given, with thoughts written by the model"
DIGITS = "0123456789A"
_LARGEST_STEP = 8  # what a misleading thought adds at most
_THOUGHT_TOKENS = 60
_REQUESTS = {
    "irrelevant": "Write one short true sentence about something that this sentence mentions, which is of "
    "no help in solving the question. Only the sentence.",
    "inaccurate": "Write one short sentence that seems to go on from this sentence, and is wrong. Only "
    "the sentence.",
}


@dataclass(frozen=True)
class Thought:
    """A step of an addition.

    Attributes:
        text: The step.
        number: In base ten, the number it is about.
        adds_base: Whether a misleading thought after it adds the base, not a number that is drawn.
    """

    text: str
    number: int
    adds_base: bool = False


@method("synthesize/nora", paper="2410.23856", code="tmlr-group/NoisyRationales", needs=("language model",))
class NoRa(Synthesizer):
    """Make demonstrations with noisy reasoning and right answers, and questions to ask after them.

    Zhou et al., "Can Language Models Perform Robust Reasoning in Chain-of-thought Prompting with Noisy
    Rationales?", NeurIPS 2024. Sums of two numbers of two digits in base 9 or 11 are reasoned out in
    eight thoughts. After a share `ratio` of them (0.3 easy, 0.5 medium, 0.8 hard) a noisy thought is put:
    irrelevant, a true fact about a number that occurs there; or inaccurate, an addition in base ten that
    misleads. Nothing is taken away, and the answer stays right. `demonstrations.jsonl` holds one clean
    demonstration and `shots` noisy ones, `questions.jsonl` other sums. Give both to `reason`.

    With the role demonstrations, questions with an answer and a field `solution`, the same is done to
    the sentences of theirs: the first, or those whose field `clean` is true, stay clean, and the model
    writes the noise. Nobody checks what it writes: read it.

    Use it to measure how much noise in demonstrations costs a model, and what a method such as
    reason/cd-cot gains. Not for what noise costs in other reasoning: that the sums here are hard for most
    models by themselves shows in the clean setting, to be measured beside.

    Differs from the paper and the code: sums only, of the five subtasks; its symbolic and kinship ones
    can be given as demonstrations. The facts about numbers are worked out (parity, square, ...), where
    the code draws from a list of trivia. All questions are asked after the same demonstrations, drawn
    anew for each seed, where the code has other ones for every question. The sums need no model: it is
    asked only where demonstrations are given.
    """

    optional: ClassVar[Mapping[str, str]] = {
        DEMONSTRATIONS: "solved questions, each with an answer and a text in field solution",
    }

    base: Literal[9, 11] = Field(default=9, description="of the sums")
    noise: Literal["irrelevant", "inaccurate"] = Field(
        default="irrelevant", description="kind of thought put in"
    )
    ratio: float = Field(default=0.5, ge=0, le=1, description="share of thoughts that noise is put after")
    placement: Literal["fixed", "random"] = Field(
        default="fixed",
        description="that share of every demonstration, or each thought with that probability",
    )
    shots: int = Field(default=3, gt=0, description="noisy demonstrations to make")
    questions: int = Field(default=300, gt=0, description="sums to ask")

    def check_records(self, records: Records) -> None:
        """Every demonstration has an answer and its reasoning."""
        if DEMONSTRATIONS not in records:
            return
        data = records[DEMONSTRATIONS]
        for number, shown in enumerate(read_questions(data), 1):
            if not shown.answers or not str(shown.more.get("solution") or "").strip():
                raise RecordsError(
                    f"{data.path}, record {number}: needs an answer, and its reasoning in field 'solution'."
                )

    def make(self, chat: ChatModel, records: Records, seed: int, step: Step) -> dict[str, list[Row]]:
        """The demonstrations, and without given ones the questions."""
        generator = random.Random(seed)
        if DEMONSTRATIONS in records:
            rows = self._given(chat, read_questions(records[DEMONSTRATIONS]), generator)
            made = {DEMONSTRATIONS: rows}
        else:
            made = self._sums(generator)
        step.tables.append(_thoughts(made[DEMONSTRATIONS]))
        return made

    def _sums(self, generator: random.Random) -> dict[str, list[Row]]:
        highest = self.base - 1
        numbers = [
            f"{DIGITS[tens]}{DIGITS[ones]}" for tens in range(1, highest + 1) for ones in range(highest + 1)
        ]
        pairs = [(left, right) for left in numbers for right in numbers]
        chosen = generator.sample(pairs, min(len(pairs), self.shots + 1 + self.questions))
        shown = []
        for place, (left, right) in enumerate(chosen[: self.shots + 1]):
            steps = thoughts(left, right, self.base)
            wanted = [] if place == 0 else self._places(len(steps), generator)
            put = noise(steps, wanted, self.noise, self.base, generator)
            texts = [each.text for each in steps]
            shown.append({**question(left, right, self.base), **self._row(texts, put), ORIGIN: FILLED})
        asked = [
            {**question(left, right, self.base), ORIGIN: FILLED} for left, right in chosen[self.shots + 1 :]
        ]
        return {DEMONSTRATIONS: shown, "questions": asked}

    def _given(self, chat: ChatModel, shown: Sequence[Question], generator: random.Random) -> list[Row]:
        marked = [each for each in shown if each.more.get("clean")] or list(shown[:1])
        texts = [sentences(str(each.more["solution"])) for each in shown]
        wanted = [
            [] if each in marked else self._places(len(parts), generator)
            for each, parts in zip(shown, texts, strict=True)
        ]
        written = self._write(chat, shown, texts, wanted, generator.randrange(2**31))
        rows = []
        for each, parts, put in zip(shown, texts, written, strict=True):
            answers = {
                "answer": list(each.answers),
                **({"options": list(each.options)} if each.options else {}),
            }
            row = {**each.more, "id": each.id, "question": each.text, **answers, **self._row(parts, put)}
            rows.append({**row, ORIGIN: WRITTEN if put else GIVEN})
        return rows

    def _write(
        self, chat: ChatModel, shown: Sequence[Question], texts: Sequence[list[str]],
        wanted: Sequence[list[int]], seed: int,
    ) -> list[dict[int, str]]:  # fmt: skip
        """The noise that the model writes, by the place of the sentence it goes after."""
        places = [(number, place) for number, those in enumerate(wanted) for place in those]
        prompts = [
            f"Question: {shown[number].text}\nSentence: {texts[number][place]}\n\n{_REQUESTS[self.noise]}"
            for number, place in places
        ]
        settings = ChatSettings(max_tokens=_THOUGHT_TOKENS, temperature=1.0, seed=seed)
        said = (
            chat.answer([[{"role": "user", "content": each}] for each in prompts], settings)
            if prompts
            else []
        )
        found: list[dict[int, str]] = [{} for _ in shown]
        for (number, place), reply in zip(places, said, strict=True):
            text = " ".join(reply.text.split())
            if text:
                found[number][place] = text
        return found

    def _places(self, count: int, generator: random.Random) -> list[int]:
        return places(count, self.ratio, self.placement, generator)

    def _row(self, texts: Sequence[str], put: Mapping[int, str]) -> Row:
        """The fields of a demonstration: reasoning with what was put in."""
        mixed = [
            part
            for place, text in enumerate(texts)
            for part in ((text, put[place]) if place in put else (text,))
        ]
        return {
            "solution": " ".join(mixed), "clean": not put, "noise": self.noise if put else "",
            "thoughts": len(texts), "noisy thoughts": len(put),
        }  # fmt: skip


def question(left: str, right: str, base: int) -> Row:
    """A sum to ask, with its answer."""
    return {
        "id": f"{left}+{right}", "answer": written(int(left, base) + int(right, base), base),
        "question": f"All numbers are in base {base}, with the digits {DIGITS[:base]}. "
        f"What is {left} + {right}?",
    }  # fmt: skip


def written(number: int, base: int) -> str:
    """A number of at least 0 in another base."""
    rest, digit = divmod(number, base)
    return (written(rest, base) if rest else "") + DIGITS[digit]


def thoughts(left: str, right: str, base: int) -> list[Thought]:
    """The eight steps of the sum of two numbers of two digits."""
    carry, ones_digit = divmod(ones := int(left[1], base) + int(right[1], base), base)
    leading, tens_digit = divmod(tens := int(left[0], base) + int(right[0], base) + carry, base)
    answer = written(int(left, base) + int(right, base), base)
    more = "more" if carry else "not more"
    return [
        Thought(f"Base {base} has the digits {DIGITS[:base]}.", base),
        Thought(f"The ones are {left[1]} + {right[1]} = {ones} in base ten.", ones),
        Thought(f"That is {more} than {DIGITS[base - 1]}, the largest digit.", base - 1),
        Thought(
            f"{ones} mod {base} is {DIGITS[ones_digit]}: that is the digit, and the carry is {carry}.",
            ones_digit, adds_base=True,
        ),
        Thought(f"The tens are {left[0]} + {right[0]}, with the carry {tens} in base ten.", tens),
        Thought(
            f"{tens} mod {base} is {DIGITS[tens_digit]}: that is the digit, and the carry is {leading}.",
            tens_digit, adds_base=True,
        ),
        Thought(f"The leading digit is {leading}.", leading, adds_base=True),
        Thought(f"So the sum is {answer}.", int(answer[-1], base), adds_base=True),
    ]  # fmt: skip


def places(
    count: int, ratio: float, placement: Literal["fixed", "random"], generator: random.Random
) -> list[int]:
    """Which thoughts noise is put after.

    Args:
        count: Of thoughts.
        ratio: Share of them.
        placement: "fixed" takes that share of them, one at least unless it is 0; "random" each by itself.
        generator: What is drawn with.
    """
    if placement == "random":
        return [place for place in range(count) if generator.random() < ratio]
    wanted = min(count, max(1, round(count * ratio))) if ratio > 0 else 0
    return sorted(generator.sample(range(count), wanted))


def noise(
    steps: Sequence[Thought], wanted: Sequence[int],
    kind: Literal["irrelevant", "inaccurate"], base: int, generator: random.Random,
) -> dict[int, str]:  # fmt: skip
    """The noisy thoughts, by the place of the thought they go after."""
    told: set[str] = set()
    found = {}
    for place in wanted:
        if kind == "inaccurate":
            found[place] = misleading(steps[place], base, generator)
        else:
            fresh = [fact for fact in facts(steps[place].number) if fact not in told]
            found[place] = generator.choice(fresh)
            told.add(found[place])
    return found


def misleading(thought: Thought, base: int, generator: random.Random) -> str:
    """An addition in base ten that has no place in the sum."""
    added = base if thought.adds_base else generator.randrange(1, _LARGEST_STEP + 1)
    return f"{thought.number} + {added} = {thought.number + added}."


def facts(number: int) -> list[str]:
    """True facts about a number, of no use for a sum."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return [
        f"The number {number} is {'odd' if number % 2 else 'even'}.",
        f"The square of {number} is {number * number}.",
        f"The cube of {number} is {number**3}.",
        f"{number} is {'a' if isqrt(number) ** 2 == number else 'no'} square number.",
        f"{number} is {'a' if len(divisors) == 2 else 'no'} prime number.",
        f"In binary, {number} is written {number:b}.",
        f"A polygon with {number + 3} corners has {number * (number + 3) // 2} diagonals.",
        f"The {number + 1} whole numbers from 0 to {number} add up to {number * (number + 1) // 2}.",
    ]


def sentences(text: str) -> list[str]:
    """The thoughts of a text: its sentences and lines."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def _thoughts(rows: Sequence[Row]) -> Table:
    """How many thoughts each demonstration has, and how many were put in."""
    columns = ["demonstration", "thoughts", "noisy thoughts put in"]
    found: list[list[str | float | int | None]] = [
        [row["id"], row["thoughts"], row["noisy thoughts"]] for row in rows
    ]
    return Table(title="Noise", columns=columns, rows=found)
