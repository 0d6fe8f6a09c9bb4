"""What a method of synthesis supplies: files of records."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from germane.core.chat import ChatModel
from germane.core.evidence import Step
from germane.core.records import Row
from germane.roles import Records, RoleMethod

ORIGIN = "origin"  # the field of every record that says where it comes from


class Synthesizer(RoleMethod):
    """Base of every method that makes records.

    Attributes:
        local: Whether it needs the model itself, so that one behind a server will not do.
    """

    local: ClassVar[bool] = False

    @abstractmethod
    def make(self, chat: ChatModel, records: Records, seed: int, step: Step) -> dict[str, list[Row]]:
        """Make records.

        Args:
            chat: The model; left as it is.
            records: Role -> records.
            seed: Of everything random.
            step: Tables, facts and findings go here.

        Returns:
            Name of a file, without its ending -> its records, each with its origin.
        """
