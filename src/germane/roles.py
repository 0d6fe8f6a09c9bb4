"""Methods that read several sets of records, each in a role: suites, and methods that make records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from germane.core.errors import RecordsError, SettingError, nearest
from germane.core.records import Data, read_rows
from germane.method import Method

Records = Mapping[str, Data]


class RoleMethod(Method):
    """Base of methods that read records by role.

    Attributes:
        roles: Roles of the records it reads, such as "forget", each with what they must be.
        optional: Roles it reads if they are there.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[Mapping[str, str]] = {}

    def check_records(self, records: Records) -> None:
        """Raise a `GermaneError` unless every role is filled with records that can be read."""
        for role, meaning in self.roles.items():
            if role not in records:
                raise SettingError(f"{self.name}: needs {meaning}: --data {role}=FILE.")
        for role in (*self.roles, *self.optional):
            if role in records:
                read_rows(records[role])

    def check_roles(self, data: Sequence[Data]) -> None:
        """Refuse roles that the method would not read, and a role given twice."""
        known = [*self.roles, *self.optional]
        names = [each.name for each in data]
        for name in names:
            if name not in known:
                raise SettingError(
                    f"data: {self.name} reads no role {name!r}{nearest(name, known)} "
                    f"Roles: {', '.join(known)}."
                )
            if names.count(name) > 1:
                raise SettingError(f"data: the role {name!r} is given twice.")


def require_fields(role: str, data: Data, names: Sequence[str]) -> None:
    """Refuse records that lack one of these texts.

    Raises:
        RecordsError: With the first such record.
    """
    for number, row in enumerate(read_rows(data), 1):
        if not all(isinstance(row.get(name), str) and row[name].strip() for name in names):
            raise RecordsError(
                f"{data.path}, record {number}: {role} needs {' and '.join(map(repr, names))}. "
                f"Fields: {', '.join(row)}."
            )


def with_places(value: str, *places: str) -> str:
    """A template in which every place is named; the `ValueError` of a settings class otherwise."""
    missing = [place for place in places if place not in value]
    if missing:
        raise ValueError(f"must say where {missing[0].strip('{}')} goes, as {missing[0]}")
    return value
