"""What keeps the generation being built, or a scratch area, from being used. Frozen data; its owner sets it.

A write may fail when nobody waits for it. Whoever comes next is then the first to tell the user, and tells
what the drive said, with its kind, errno, path and offset: `because_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OffloadError, StateError, StorageError

__all__ = ["Poison", "because_of"]


@dataclass(frozen=True, slots=True)
class Poison:
    """Why the generation being built cannot be committed.

    Attributes:
        cause: the error it began with.
        reason: for messages, where a commit failed; a write did where it is empty.
    """

    cause: BaseException
    reason: str = ""

    @property
    def permanent(self) -> bool:
        """Whether a rollback does not help."""
        return bool(self.reason)

    def error(self, generation: int, what: str) -> OffloadError:
        """Return the error for one who wants the generation after the committed `generation` to `what`."""
        if not self.permanent:
            text = f"generation {generation + 1} cannot {what}; generation {generation} is intact: roll back"
            return because_of(self.cause, text)
        # Whoever began the commit was told why.
        error = StateError(
            f"generation {generation + 1} cannot {what}, because {self.reason}; generation "
            f"{generation} is intact: close the run and open it again"
        )
        error.__cause__ = self.cause
        return error


def because_of(cause: BaseException, consequence: str) -> OffloadError:
    """Return the error of one who meets a write that failed before: of its kind where a drive failed.

    Args:
        cause: why the write failed.
        consequence: what cannot be done now, and what to do.
    """
    text = f"{str(cause) or type(cause).__name__}; after this failed write, {consequence}"
    if isinstance(cause, StorageError):
        return cause.restated(text)
    error = StateError(text)
    error.__cause__ = cause
    return error
