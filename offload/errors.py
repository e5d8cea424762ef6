"""The exceptions of `offload`, and nothing else.

    OffloadError
      +-- StorageError (OSError)        a drive or file system refused, failed or ran out
      |     +-- DiskFullError           not enough space, with bytes needed and free
      |     +-- CorruptionError         bytes read are not the bytes written (checksum, manifest)
      |     +-- LockedError             another process holds the run
      |     +-- RequestTimeoutError     (also TimeoutError) an I/O request took too long
      +-- CapacityError (MemoryError)   a byte budget would be exceeded
      +-- PlanError (ValueError)        a configuration cannot work on this machine
      |     +-- UnitError               a model cannot be cut into units
      |     +-- ConfigError             a key or value of a configuration is wrong
      +-- StateError (RuntimeError)     a call out of order: closed, poisoned, detached, not supported

Every class pickles with its attributes. A message says what failed, on what, what was got and what
was wanted, and what to do next.
"""

from __future__ import annotations

from typing import Any, Self

__all__ = [
    "CapacityError",
    "ConfigError",
    "CorruptionError",
    "DiskFullError",
    "LockedError",
    "OffloadError",
    "PlanError",
    "RequestTimeoutError",
    "StateError",
    "StorageError",
    "UnitError",
]


class OffloadError(Exception):
    """Root of every error that `offload` raises on purpose."""

    exit_code = 1


class StorageError(OffloadError, OSError):
    """A read, write, sync or file operation failed.

    Args:
        message: the whole message, ready to print.
        errno: the operating system's error number, 0 where there is none (a short read, say).
        path: the file or directory concerned.
        offset_bytes: where in the file the operation began, or None.
        asked_nbytes: bytes asked for, or None.
        got_nbytes: bytes transferred before the failure, or None.
    """

    exit_code = 74

    def __init__(
        self,
        message: str,
        *,
        errno: int = 0,
        path: str = "",
        offset_bytes: int | None = None,
        asked_nbytes: int | None = None,
        got_nbytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno
        self.path = path
        self.offset_bytes = offset_bytes
        self.asked_nbytes = asked_nbytes
        self.got_nbytes = got_nbytes

    def __str__(self) -> str:
        return self.message

    def restated(self, message: str) -> Self:
        """Return an error of this kind, number and place with another message; this one is its cause."""
        error = type(self)(
            message,
            errno=self.errno or 0,
            path=self.path,
            offset_bytes=self.offset_bytes,
            asked_nbytes=self.asked_nbytes,
            got_nbytes=self.got_nbytes,
        )
        error.__cause__ = self
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError keeps errno in a C slot, so __dict__ alone would lose it.
        return _rebuild, (type(self), self.message, {**self.__dict__, "errno": self.errno})


class DiskFullError(StorageError):
    """A drive has less free space than an operation needs (ENOSPC, EDQUOT, or a failed reservation)."""

    exit_code = 75


class CorruptionError(StorageError):
    """Stored bytes fail their checksum, or a manifest is not what was written."""

    exit_code = 76


class LockedError(StorageError):
    """Another live process holds the lock of a run."""


class RequestTimeoutError(StorageError, TimeoutError):
    """A request did not complete within the time its waiter allowed; it is still in flight."""


class CapacityError(OffloadError, MemoryError):
    """A tier's byte budget would be exceeded; the message names who holds what."""

    exit_code = 3


class PlanError(OffloadError, ValueError):
    """What was asked for cannot run here, and why."""

    exit_code = 2


class UnitError(PlanError):
    """A model cannot be cut into units."""


class ConfigError(PlanError):
    """A configuration key or value is wrong."""


class StateError(OffloadError, RuntimeError):
    """A call that the object's present state does not allow."""


def _rebuild(cls: type[StorageError], message: str, state: dict[str, Any]) -> StorageError:
    error = cls(message)
    for name, value in state.items():
        setattr(error, name, value)
    return error
