"""Methods that read several sets of records, each in a role: suites, and methods that make records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from germane.core.errors import SettingError, nearest
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
