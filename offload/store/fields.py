"""Values read out of the JSON of a file on a drive, which is not trusted: checked, or refused by name.

Every number is checked against a cap before it is used. Pure; `format` and `snapshot_format` know
which values a file has.
"""

from __future__ import annotations

import re
import struct
from typing import Any, NoReturn, TypeVar, cast
from uuid import UUID

from ..errors import CorruptionError

__all__ = ["Fields"]

T = TypeVar("T")


class Fields:
    """Reads values out of parsed JSON, refusing with the path and the key.

    Args:
        path: the file's path, for messages.
        what: what the file is, "manifest".

    Raises:
        CorruptionError: from every method, for a value that no valid file has; names the value.
    """

    def __init__(self, path: str, what: str) -> None:
        self._path = path
        self._what = what

    def refuse(self, what: str) -> NoReturn:
        """Raise: the file is not valid, because of `what`."""
        raise CorruptionError(f"{self._path} is not a valid {self._what}: {what}", path=self._path)

    def value(self, table: Any, key: str, kind: type[T]) -> T:
        """Return the value of `key`, which must be exactly of type `kind`."""
        value = table.get(key) if isinstance(table, dict) else None
        # bool is an int to isinstance, and not to us.
        if type(value) is not kind:
            self.refuse(f"{key!r} is {type(value).__name__}, expected {kind.__name__}")
        return value

    def number(self, table: Any, key: str, low: int, high: int, multiple: int = 1) -> int:
        """Return the value of `key`, a multiple from `low` to `high`."""
        return self.checked(self.value(table, key, int), key, low, high, multiple)

    def checked(self, value: Any, key: str, low: int, high: int, multiple: int = 1) -> int:
        """Return `value`, which must be a multiple from `low` to `high`."""
        if type(value) is not int or not low <= value <= high or value % multiple:
            self.refuse(f"{key!r} holds {value!r:.40}, expected {low} to {high} in steps of {multiple}")
        return value

    def numbers(self, value: Any, key: str, count: int, high: int, multiple: int = 1) -> tuple[int, ...]:
        """Return `value`, which must be a list of `count` multiples from 0 to `high`."""
        if type(value) is not list or len(value) != count:
            self.refuse(f"{key!r} is not a list of {count} numbers")
        return tuple(self.checked(item, key, 0, high, multiple) for item in value)

    def items(self, table: Any, key: str, low: int, high: int) -> list[Any]:
        """Return the value of `key`, a list of `low` to `high` entries."""
        items = self.value(table, key, cast("type[list[Any]]", list))
        if not low <= len(items) <= high:
            self.refuse(f"{key!r} has {len(items):,} entries, expected {low} to {high:,}")
        return items

    def run_id(self, body: dict[str, Any]) -> UUID:
        """Return the run's id, which must be written as a canonical UUID."""
        text = self.value(body, "run_id", str)
        try:
            run_id = UUID(text)
        except ValueError as error:
            self.refuse(f"'run_id': {error}")
        if str(run_id) != text:
            self.refuse("'run_id' is not written as a canonical UUID")
        return run_id

    def checksums(self, table: Any, count: int) -> tuple[int, ...]:
        """Return the crc32c values of `count` chunks."""
        text = self.value(table, "crc32c", str)
        if len(text) != 8 * count or not re.fullmatch(r"[0-9a-f]*", text):
            self.refuse(f"'crc32c' has {len(text)} characters, expected {count} checksums of 8 digits")
        return struct.unpack(f">{count}I", bytes.fromhex(text))
