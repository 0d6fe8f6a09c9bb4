"""Chains of thought: how they are asked for, shown, sampled, read and voted on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from germane.core.answers import normalise
from germane.core.chat import ChatSettings, Conversation
from germane.core.errors import RecordsError
from germane.solver import Question, Solving, read_answer

SOLUTION = "solution"  # the field of a demonstration that holds its reasoning
_SEEDS = 1000  # seeds of sampled rounds that two seeds of a run do not share
_STATED = re.compile(r"\banswer\s*(?:is\b|[:=])", flags=re.IGNORECASE)
# A number alone, or before a word such as its unit; not a part of 1/2, 10:30 or 8A.
_NUMBER = re.compile(r"[^\w−-]*(-?\d[\d,]*(?:\.\d+)?)(?=[\s%$.,;!?)]*(?:$|\s[A-Za-z]))")


@dataclass(frozen=True)
class Vote:
    """What several answers to one question come to.

    Attributes:
        answer: The most frequent, of equals the one seen first; "" if no reply states one.
        confidence: Its share of all replies, those that state no answer included.
        counts: How often each answer came, as it was first written.
    """

    answer: str
    confidence: float
    counts: dict[str, int]


def instruction(question: Question) -> str:
    """The question, with steps and then the answer in a fixed form asked for."""
    form = "the letter of the right option" if question.options else "the answer, as short as possible"
    return (
        f"{question.lettered}\n\nThink step by step. End with a line that says 'The answer is', and {form}."
    )


def short_answer(shown: Question) -> str:
    """The answer of a solved question: of options, the letter."""
    answer = shown.answers[0]
    return ascii_uppercase[shown.options.index(answer)] if shown.options else answer


def worked(shown: Question) -> str:
    """The reasoning of a solved question, where there is some, and its answer as chains end."""
    solution = str(shown.more.get(SOLUTION) or "").strip()
    return f"{solution}\nThe answer is {short_answer(shown)}.".strip()


def conversation(question: Question, shown: Sequence[Question] = (), before: str = "") -> Conversation:
    """What is said to have a question reasoned out.

    Args:
        question: To be answered.
        shown: Solved questions, each as a turn of the user and one of the model.
        before: What the user says first of all.
    """
    messages = []
    for solved in shown:
        messages.append({"role": "user", "content": instruction(solved)})
        messages.append({"role": "assistant", "content": worked(solved)})
    messages.append({"role": "user", "content": instruction(question)})
    if before:
        messages[0]["content"] = f"{before}\n\n{messages[0]['content']}"
    return messages


def check_solved(name: str, demonstrations: Sequence[Question], field: str = "") -> None:
    """Refuse demonstrations without an answer, or without the text that is asked for.

    Raises:
        RecordsError: With the demonstration's id.
    """
    for shown in demonstrations:
        if not shown.answers:
            raise RecordsError(f"{name}: demonstration {shown.id!r} has no answer to show.")
        if field and not str(shown.more.get(field) or "").strip():
            raise RecordsError(
                f"{name}: demonstration {shown.id!r} needs a text in field {field!r}. "
                f"Other fields it has: {', '.join(shown.more) or 'none'}."
            )


def stated(reply: str, question: Question) -> str:
    """The answer that a chain ends in: the option it chooses, or what it says the answer is; "" if none."""
    if question.options or _STATED.search(reply):
        return read_answer(reply, question)
    return ""


def concluded(
    solving: Solving,
    questions: Sequence[Question],
    prompts: Sequence[Conversation],
    replies: Sequence[str],
) -> list[str]:
    """The answer of each chain; where it states none, the model is asked for it, after its own chain."""
    found = [stated(reply, question) for question, reply in zip(questions, replies, strict=True)]
    open_ended = [place for place, answer in enumerate(found) if not answer]
    asked = [
        [
            *prompts[place],
            {"role": "assistant", "content": replies[place]},
            {
                "role": "user",
                "content": "So what is the final answer? Say it only, as 'The answer is ...'.",
            },
        ]
        for place in open_ended
    ]
    said = solving.ask(
        [questions[place] for place in open_ended], asked, "extract", ChatSettings(max_tokens=32)
    )
    for place, reply in zip(open_ended, said, strict=True):
        found[place] = read_answer(reply, questions[place])
    return found


def sampled(
    solving: Solving,
    questions: Sequence[Question],
    prompts: Sequence[Conversation],
    purpose: str,
    settings: ChatSettings,
    rounds: int,
    first: int = 0,
) -> list[list[str]]:
    """The replies to each prompt in several rounds, each with a seed of its own.

    A server that heeds the seed would answer the same prompt alike within a round, so every prompt is
    asked once a round.

    Args:
        solving: What is asked with.
        questions: The question that each prompt is for.
        prompts: Conversations.
        purpose: As in a trace.
        settings: Of the generation, but for the seed.
        rounds: Replies to each prompt.
        first: Number of the first round, where others went before.
    """
    found: list[list[str]] = [[] for _ in prompts]
    for number in range(first, first + rounds):
        drawn = settings.model_copy(update={"seed": solving.seed * _SEEDS + number})
        for replies, reply in zip(found, solving.ask(questions, prompts, purpose, drawn), strict=True):
            replies.append(reply)
    return found


def vote(answers: Sequence[str], question: Question) -> Vote:
    """The majority of answers to a question, where "" stands for a reply that states none.

    Options are told apart as they are; answers to open questions agree when they are the same number, or
    have the same words but for articles.
    """
    keys = [answer if question.options else _key(answer) for answer in answers]
    written: dict[str, str] = {}
    for key, answer in zip(keys, answers, strict=True):
        written.setdefault(key, answer)
    counts = Counter(key for key in keys if key)  # in the order in which they were seen
    if not counts:
        return Vote("", 0.0, {})
    best, count = counts.most_common(1)[0]
    return Vote(written[best], count / len(answers), {written[key]: n for key, n in counts.items()})


def behind(replies: Sequence[str], answers: Sequence[str], found: Vote) -> str:
    """The first reply that states the majority's answer; without any, the first."""
    pairs = zip(replies, answers, strict=True)
    return next((reply for reply, answer in pairs if answer and answer == found.answer), replies[0])


def _key(answer: str) -> str:
    """What is the same of answers that say the same: the number they begin with, or their words."""
    number = _NUMBER.match(answer)
    if number:
        return str(float(number[1].replace(",", "")))
    return normalise(answer) or answer.strip()
