"""What keeps the generation being built, or a scratch area, from being used. Frozen data; its owner sets it.

A write may fail when nobody waits for it, and a commit on another thread. Whoever comes next may be the first
to tell the user, and tells what the drive said, with its kind, errno, path and offset: `because_of`.
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
        permanent: whether a rollback does not help: a commit failed, and not a write.
        in_place: whether what was committed has been written over, so that nothing is left to go back to.
    """

    cause: BaseException
    permanent: bool = False
    in_place: bool = False

    def error(self, generation: int, what: str) -> OffloadError:
        """Return the error for one who wants the generation after the committed `generation` to `what`."""
        failed, cure = (
            ("commit", "close the run and open it again") if self.permanent else ("write", "roll back")
        )
        kept = f"generation {generation} is intact: {cure}"
        if self.in_place:
            kept = "what was committed was written over (commit: off): the run is lost if it cannot be opened"
        text = f"generation {generation + 1} cannot {what}; {kept}"
        return because_of(self.cause, text, failed=failed)


def because_of(cause: BaseException, consequence: str, *, failed: str = "write") -> OffloadError:
    """Return the error of one who meets what failed before: of its kind where a drive failed.

    Args:
        cause: the failure.
        consequence: what cannot be done now, and what to do.
        failed: what it ended.
    """
    text = f"{str(cause) or type(cause).__name__}; after this failed {failed}, {consequence}"
    if isinstance(cause, StorageError):
        return cause.restated(text)
    error = StateError(text)
    error.__cause__ = cause
    return error
