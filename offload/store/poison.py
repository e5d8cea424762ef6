"""What keeps the generation being built from being committed. Frozen data; the store sets and lifts it."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import StateError

__all__ = ["Poison"]


@dataclass(frozen=True, slots=True)
class Poison:
    """Why the generation being built cannot be committed.

    Attributes:
        reason: for messages.
        cause: the error it began with.
        permanent: whether a rollback does not help.
    """

    reason: str
    cause: BaseException | None = None
    permanent: bool = False

    def error(self, generation: int, what: str) -> StateError:
        """Return the error for one who wants the generation after the committed `generation` to `what`."""
        cure = "close the run and open it again" if self.permanent else "roll back"
        return StateError(
            f"generation {generation + 1} cannot {what}, because {self.reason}; generation "
            f"{generation} is intact: {cure}"
        )
