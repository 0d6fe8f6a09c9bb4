"""Methods of reason and ground as solvers of Inspect, and files of questions as a task of it.

    inspect eval germane/questions -T path=questions.jsonl --solver germane/chain-of-thought --model MODEL

Every method is the solver `germane/METHOD`; its settings are the solver's arguments (`-S samples=5`), and
`demonstrations` is a file of solved questions. It takes Inspect's own samples, too: a sample's choices are
the options, and its metadata may hold `passages`, a `table` and what else the method reads. The model is
Inspect's, whatever it is; every call is in Inspect's log, and what became of each passage is in the
sample's metadata under `germane`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

import anyio.from_thread
import anyio.to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.scorer import Score, Target, accuracy, scorer, stderr
from inspect_ai.solver import Generate, TaskState, solver
from inspect_ai.solver import Solver as InspectSolver
from inspect_ai.util import collect

from germane.core.chat import ChatModel, ChatSettings, Conversation, Reply
from germane.core.errors import SettingError
from germane.core.records import Data
from germane.method import build, names
from germane.solver import (
    Answer,
    Question,
    Solver,
    Solving,
    as_question,
    is_right,
    read_questions,
)

_MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FOUND = "germane"  # in a sample's metadata


class InspectChat(ChatModel):
    """A model of Inspect, asked from a worker's thread while Inspect's event loop goes on.

    Args:
        model: Inspect's model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.calls = []

    @property
    def name(self) -> str:
        return str(self._model)

    def fingerprint(self) -> str:
        return f"inspect {self._model}"

    def answer_each(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """All conversations at once; how many go to the model at a time is Inspect's `max_connections`."""
        yield from enumerate(anyio.from_thread.run(self._answer_all, conversations, settings))

    async def _answer_all(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None
    ) -> list[Reply]:
        config = _config(settings or ChatSettings())
        return await collect(*(self._answer_one(conversation, config) for conversation in conversations))

    async def _answer_one(self, conversation: Conversation, config: GenerateConfig) -> Reply:
        messages: list[ChatMessage] = [
            _MESSAGES[message["role"]](content=message["content"]) for message in conversation
        ]
        output = await self._model.generate(messages, config=config)
        usage = output.usage
        return Reply(
            text=output.completion,
            finish="length" if output.stop_reason == "max_tokens" else "stop",
            prompt_tokens=usage.input_tokens if usage else 0,
            completion_tokens=usage.output_tokens if usage else 0,
            seconds=output.time or 0.0,
        )

    def log_probabilities(self, conversations: Any, continuations: Any) -> NoReturn:
        self._refuse()

    def option_log_probabilities(self, conversations: Any, options: Any) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SettingError(
            f"{self.name}: Inspect's models give no log-probability of a given text; "
            "run the method with `germane` on the model itself."
        )


def _config(settings: ChatSettings) -> GenerateConfig:
    return GenerateConfig(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_seqs=settings.stop or None,
        seed=settings.seed,
    )


def _as_solver(name: str) -> Any:
    """The solver of Inspect that a method is."""

    @solver(name=name.rpartition("/")[2])
    def make(demonstrations: str = "", seed: int = 0, **settings: Any) -> InspectSolver:
        method = build(name, settings)
        assert isinstance(method, Solver)
        shown = read_questions(Data(name="demonstrations", path=demonstrations)) if demonstrations else []
        if "demonstrations" in method.information.needs and not shown:
            raise SettingError(f"{name}: needs solved questions to show: -S demonstrations=FILE.")

        async def solve(state: TaskState, generate: Generate) -> TaskState:
            question = question_of(state)
            method.check_questions([question], shown)
            solving = Solving(InspectChat(get_model()), shown, seed)
            answers = await anyio.to_thread.run_sync(method.solve, solving, [question])
            _fill(state, answers[0])
            return state

        return solve

    return make


def question_of(state: TaskState) -> Question:
    """An Inspect sample as a question.

    Raises:
        RecordsError: Passages without text, or an answer that is none of the choices.
    """
    options = [choice.value for choice in state.choices]
    known = state.metadata or {}
    row = {**known, "question": state.input_text, "answer": list(state.target), "options": options}
    return as_question(row, Data(name="sample", path=f"sample {state.sample_id}"), str(state.sample_id))


def _fill(state: TaskState, answer: Answer) -> None:
    """The answer as the sample's output, and as the chosen one of its choices."""
    state.output = ModelOutput.from_content(str(state.model), answer.text)
    state.messages.append(state.output.message)
    for number, choice in enumerate(state.choices):
        state.choices.mark_choice(number, choice.value == answer.text)
    found = {"response": answer.response, "uses": [asdict(use) for use in answer.uses]}
    state.metadata[_FOUND] = {**found, "details": dict(answer.details)}
    state.completed = True


SOLVERS = {name: _as_solver(name) for part in ("reason", "ground") for name in names(part)}


@scorer(name="right", metrics=[accuracy(), stderr()])
def right() -> Any:
    """Whether the answer is right, as germane's own tasks count it: by the marked choice, if one is."""

    async def score(state: TaskState, target: Target) -> Score:
        marked = [choice.value for choice in state.choices if choice.correct]
        text = marked[0] if len(marked) == 1 else state.output.completion
        return Score(value="C" if is_right(question_of(state), text) else "I", answer=text)

    return score


@task
def questions(path: str) -> Task:
    """Questions of a file in germane's form, from `germane synthesize` or anywhere; `reason/direct` solves.

    Args:
        path: The file; see `germane.solver.read_questions`.
    """
    asked = read_questions(Data(name="questions", path=path))
    return Task(
        dataset=MemoryDataset([as_sample(question) for question in asked], name=path),
        solver=SOLVERS["reason/direct"](),
        scorer=right(),
    )


def as_sample(question: Question) -> Sample:
    """A question as an Inspect sample: of a choice the target is its letter."""
    target = [
        _LETTERS[question.options.index(answer)] if question.options else answer
        for answer in question.answers
    ]
    passages = [asdict(passage) for passage in question.passages]
    return Sample(
        id=question.id,
        input=question.text,
        choices=list(question.options) or None,
        target=target,
        metadata={**question.more, "passages": passages},
    )
