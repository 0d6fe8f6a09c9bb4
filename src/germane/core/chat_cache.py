"""Answers kept on disk, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from germane.core.chat import Call, ChatModel, ChatSettings, Continuation, Conversation, Reply
from germane.core.errors import SettingError
from germane.core.progress import announce

Value = TypeVar("Value")

_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, value TEXT) WITHOUT ROWID"
_PATIENCE = 60.0  # seconds that one process waits for another to write
_AT_ONCE = 500  # keys in one question to the file, well below SQLite's limit of variables
_setting_aside = threading.Lock()


@dataclass
class CachedChat(ChatModel):
    """A chat model that asks another only what it was not asked before.

    An answer is found again by the model's fingerprint, the conversation and the settings, sampled ones
    also by their seed and by which repetition in one call it is. Each is written as soon as it is there.
    Of a model in this process the fingerprint is taken once: after its weights were changed, make another.

    Attributes:
        chat: Who answers what is not in the file.
        file: Where answers are kept, for many threads and processes.
        calls: Every call so far, those answered from the file included.
    """

    chat: ChatModel
    file: Path
    calls: list[Call] = field(default_factory=list)
    _fingerprint: str = field(default="", init=False, repr=False)

    @property
    def name(self) -> str:
        """That of the model behind it."""
        return self.chat.name

    def fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = self.chat.fingerprint()
        return self._fingerprint

    def answer_each(
        self, conversations: Sequence[Conversation], settings: ChatSettings | None = None
    ) -> Iterator[tuple[int, Reply]]:
        chosen = settings or ChatSettings()
        wanted = self._numbers(conversations, chosen)
        known = self._read(list(wanted))
        for key, value in known.items():
            yield from ((number, replace(Reply(**value), cached=True)) for number in wanted[key])
        missing = [key for key in wanted if key not in known]
        asked = [conversations[wanted[key][0]] for key in missing]
        for number, reply in self.chat.answer_each(asked, chosen) if asked else ():
            self._write({missing[number]: asdict(reply)})
            first, *others = wanted[missing[number]]
            yield first, reply
            yield from ((other, replace(reply, cached=True)) for other in others)

    def log_probabilities(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[Continuation]:
        pairs = list(zip(conversations, continuations, strict=True))
        keys = [self._key("continuation", _plain(messages), text) for messages, text in pairs]

        def ask(numbers: list[int]) -> list[Any]:
            picked = [pairs[number] for number in numbers]
            found = self.chat.log_probabilities([pair[0] for pair in picked], [pair[1] for pair in picked])
            return [asdict(one) for one in found]

        return [Continuation(**value) for value in self._through(keys, ask)]

    def option_log_probabilities(
        self, conversations: Sequence[Conversation], options: Sequence[str]
    ) -> list[dict[str, float]]:
        keys = [self._key("options", _plain(messages), list(options)) for messages in conversations]

        def ask(numbers: list[int]) -> list[Any]:
            return self.chat.option_log_probabilities(
                [conversations[number] for number in numbers], options
            )

        return self._through(keys, ask)

    def _numbers(
        self, conversations: Sequence[Conversation], settings: ChatSettings
    ) -> dict[str, list[int]]:
        """Key -> the conversations that one answer is good for."""
        sampled = settings.temperature > 0
        chosen = settings.model_dump(mode="json", exclude=None if sampled else {"seed", "top_p"})
        times: Counter[str] = Counter()
        found: dict[str, list[int]] = {}
        for number, messages in enumerate(conversations):
            said = json.dumps(_plain(messages))
            key = self._key("answer", said, chosen, times[said] if sampled else 0)
            times[said] += 1
            found.setdefault(key, []).append(number)
        return found

    def _key(self, *parts: Any) -> str:
        content = json.dumps([self.fingerprint(), *parts], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _through(self, keys: Sequence[str], ask: Callable[[list[int]], list[Any]]) -> list[Any]:
        """The value of each key, from the file or by asking for those that are not there."""
        known = self._read(keys)
        missing = {key: number for number, key in enumerate(keys) if key not in known}
        if missing:
            new = dict(zip(missing, ask(list(missing.values())), strict=True))
            self._write(new)
            known |= new
        return [known[key] for key in keys]

    def _read(self, keys: Sequence[str]) -> dict[str, Any]:
        def read(connection: sqlite3.Connection) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for start in range(0, len(keys), _AT_ONCE):
                part = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"SELECT key, value FROM answers WHERE key IN ({marks})", part)
                found |= {key: json.loads(value) for key, value in rows}
            return found

        return self._run(read)

    def _write(self, values: dict[str, Any]) -> None:
        rows = [(key, self.name, json.dumps(value)) for key, value in values.items()]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

        self._run(write)

    def _run(self, work: Callable[[sqlite3.Connection], Value]) -> Value:
        """Do something with the file, through a connection that no other thread or process has.

        Raises:
            SettingError: The file cannot be opened or written.
        """
        file = Path(self.file)
        while True:
            opened = None
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                opened = file.stat().st_ino
                with closing(sqlite3.connect(file, timeout=_PATIENCE)) as connection:
                    connection.execute("PRAGMA journal_mode=WAL")
                    connection.execute("PRAGMA synchronous=NORMAL")
                    connection.execute(_TABLE)
                    return work(connection)
            except (sqlite3.OperationalError, OSError) as error:
                raise SettingError(f"{file}: answers cannot be kept here: {error}") from None
            except (sqlite3.DatabaseError, ValueError) as error:
                _set_aside(file, opened, error)


def _plain(messages: Conversation) -> list[dict[str, str]]:
    return [dict(message) for message in messages]


def _set_aside(file: Path, damaged: int | None, error: Exception) -> None:
    """Rename a damaged file, unless another thread or process has already put a new one in its place."""
    with _setting_aside:
        if not file.exists() or file.stat().st_ino != damaged:
            return
        aside = file.with_name(f"{file.name}.damaged-{os.getpid()}-{damaged}")
        for ending in ("-wal", "-shm", ""):  # the file last: from then on there may be a new one
            if Path(f"{file}{ending}").exists():
                Path(f"{file}{ending}").replace(f"{aside}{ending}")
    announce(f"{file}: damaged ({error}); set aside as {aside.name}, and begun anew.")
