"""What an edited model is: a folder that says which facts were changed, by which method, and how.

An edited folder is a model folder with `edits.json`, which lists the edits; `originals/`, the weights
that were changed, as they were; and, of methods that act beside the weights, `memory.safetensors`.
The base of all methods of the task edit is here, since whoever measures an edited model must open it.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from germane.core.chat import ChatModel, open_chat
from germane.core.checkpoint import Checkpoint, locate
from germane.core.errors import CheckpointError
from germane.core.evidence import Step
from germane.core.generation import continue_texts
from germane.core.models import MEMORY, Loaded, load_model
from germane.core.settings import Settings, validate
from germane.method import Method, build

LIST = "edits.json"
ORIGINALS = "originals"
STOP = ("\n",)  # ends an answer
Pair = tuple[str, str]  # a prompt and its answer


class Edit(Settings):
    """One fact to change.

    Answers begin with the blank that separates them from their prompt, as the tokenizer reads it.
    """

    id: str = Field(description="how it is called in lists")
    prompt: str = Field(description="what the model is asked, or a sentence's beginning")
    answer: str = Field(description="what it should say from now on")
    subject: str = Field(default="", description="whom or what the fact is about, as in the prompt")
    statement: str = Field(default="", description="the fact as a sentence; default: prompt and answer")
    rephrase: list[str] = Field(default=[], description="other prompts that ask the same")
    locality: list[Pair] = Field(default=[], description="prompts whose answers must not move")
    portability: list[Pair] = Field(default=[], description="prompts whose answers follow from the fact")
    irrelevant: str = Field(default="", description="a text that has nothing to do with the fact")
    other: str = Field(default="", description="a second answer, which `loss` weighs against the first")
    loss: Literal["good", "bad", "good-v-bad", "balance"] = Field(
        default="good", description="what is wanted: the answer, not it, it before the other, or neither"
    )

    @property
    def sentence(self) -> str:
        """The fact as a sentence."""
        return self.statement or f"{self.prompt}{self.answer}"

    def weigh(self, answer: Tensor, other: Tensor | None = None) -> Tensor:
        """What `loss` makes of the losses of the two answers: less is better.

        Source: Hewitt et al., "Model Editing with Canonical Examples", 2024.
        """
        if self.loss in ("good", "bad"):
            return answer if self.loss == "good" else -answer
        assert other is not None
        return (answer - other).abs() if self.loss == "balance" else answer - other


class EditList(Settings):
    """What `edits.json` says."""

    method: str = Field(description="the method, as TASK/NAME")
    settings: dict[str, Any] = Field(default={}, description="its settings")
    model: str = Field(description="the untouched model: a folder, a hub id or an address")
    edits: list[Edit] = Field(default=[], description="the edits, in the order they were made")

    @property
    def active(self) -> list[Edit]:
        """The edits that no later one contradicts."""
        over = replaced(self.edits)
        return [edit for edit in self.edits if edit.id not in over]

    def save(self, folder: Path) -> None:
        """Write the list into a folder."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (folder / LIST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> EditList | None:
        """The list of a folder, or None where nothing was edited.

        Raises:
            CheckpointError: There is one, but it is none.
        """
        file = folder / LIST
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file}: not JSON: {error}") from None
        return validate(cls, content, str(file))


def replaced(edits: Sequence[Edit]) -> dict[str, str]:
    """Of edits that a later one contradicts, their ids, each with the id of the later one.

    Two edits contradict each other when they ask the same and answer differently.
    """
    latest: dict[str, Edit] = {}
    found = {}
    for edit in edits:
        asked = " ".join(edit.prompt.lower().split())
        earlier = latest.get(asked)
        if earlier is not None and earlier.answer.strip().lower() != edit.answer.strip().lower():
            found[earlier.id] = edit.id
        latest[asked] = edit
    return found


@dataclass
class Editing:
    """A model that is being edited, or that was.

    Attributes:
        loaded: The model, changed in place; None where it is behind a server.
        chat: The model as one that answers conversations.
        edits: The edits made so far, but for those that later ones replaced.
        general: Texts that have nothing to do with any edit, for methods that keep the rest unmoved.
        seed: Of everything random.
        step: What there is to say goes here.
        memory: What a method keeps beside the weights; its own, as `Editor.attach` made it.
    """

    loaded: Loaded | None
    chat: ChatModel
    edits: list[Edit] = field(default_factory=list)
    general: list[str] = field(default_factory=list)
    seed: int = 0
    step: Step = field(default_factory=lambda: Step(task="edit", method=""))
    memory: Any = None

    @property
    def model(self) -> Any:
        """The model itself, for methods that need its weights: the task has checked that it is there."""
        assert self.loaded is not None
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        assert self.loaded is not None
        return self.loaded.processor


class Editor(Method):
    """A method of editing.

    A method changes weights in place, or keeps a memory beside them that acts through forward hooks,
    so that the weights stay what they were; or it does neither, and answers in a way of its own.
    """

    def check(self, edits: Sequence[Edit], source: Checkpoint | None) -> None:
        """Raise a `GermaneError` for edits or a model that the method cannot work with, before any work.

        Args:
            edits: What is to be made.
            source: The model's files; None where it is behind a server.
        """

    def attach(self, editing: Editing, state: dict[str, Tensor]) -> None:
        """Put the memory of `editing.edits` in place; called once, before `edit` and before any question.

        Args:
            editing: The model, whose `memory` is set here by methods that have one.
            state: What `state` returned when the model was saved; {} for a model without edits.
        """

    @abstractmethod
    def edit(self, editing: Editing, edits: Sequence[Edit]) -> None:
        """Make these edits, after those of `editing.edits`, in their order."""

    def state(self, editing: Editing) -> dict[str, Tensor]:
        """The memory as tensors, to be saved; {} for methods that change weights only."""
        return {}

    def answer(self, editing: Editing, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """What the edited model says to each prompt, the likeliest token always, up to the line's end."""
        return continue_texts(editing.model, editing.tokenizer, prompts, max_new_tokens, STOP)


def load_edited(path: str) -> tuple[Editor | None, Editing]:
    """An edited model, its memory in place, with the method that answers for it.

    Args:
        path: A folder; also of a model without edits, which then has no editor.

    Raises:
        CheckpointError: No such model, or its list or memory is damaged.
    """
    folder = locate(path)
    listed = EditList.read(folder)
    loaded = load_model(path, beside=True) if (folder / "config.json").is_file() else None
    if loaded is None and listed is None:
        raise CheckpointError(f"{path}: is no model folder: it has no config.json and no {LIST}.")
    chat = open_chat(listed.model if listed and loaded is None else path, loaded)
    editing = Editing(loaded, chat, listed.active if listed else [])
    if listed is None:
        return None, editing
    editor = build(listed.method, listed.settings, str(folder / LIST))
    assert isinstance(editor, Editor)
    editor.attach(editing, read_memory(folder))
    return editor, editing


def answer(path: str, prompts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
    """What an edited model says to each prompt, the likeliest token always, up to the line's end."""
    editor, editing = load_edited(path)
    if editor is None:
        return continue_texts(editing.model, editing.tokenizer, prompts, max_new_tokens, STOP)
    return editor.answer(editing, prompts, max_new_tokens)


def load_to_measure(path: str) -> Loaded:
    """A model as it answers, with the memory of its edits in place if it has any.

    Raises:
        CheckpointError: As `load_edited`; or a model behind a server, of which there is nothing to see.
    """
    _, editing = load_edited(path)
    if editing.loaded is None:
        raise CheckpointError(f"{path}: its model is behind a server, and has no weights here to measure.")
    return editing.loaded


def read_memory(folder: Path) -> dict[str, Tensor]:
    """What a method keeps beside the weights; {} if nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / MEMORY
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
