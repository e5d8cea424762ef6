"""A finding: what is wrong, how bad that is, and the one line that mends it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "Severity", "exit_code"]


class Severity(Enum):
    """How bad it is."""

    ERROR = "error"  # something will not work
    WARNING = "warning"  # it works, but slower, or with less of what offload promises
    NOTE = "note"  # nothing to do, or to know in a discussion of figures

    @property
    def exit_code(self) -> int:
        """What a command that found this ends with: as `PlanError` when something cannot work."""
        return {Severity.ERROR: 2, Severity.WARNING: 1, Severity.NOTE: 0}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        id: a name that stays, for programs: `io-uring-refused`.
        severity: how bad it is.
        about: what it concerns: a directory, `GPU 0`, `host`, `software`, `I/O engine`.
        problem: one sentence with the figures.
        fix: one line: a command, or what to do.
    """

    id: str
    severity: Severity
    about: str
    problem: str
    fix: str


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 2 when something will not work, 1 when there are warnings, else 0."""
    return max((finding.severity.exit_code for finding in findings), default=0)
