"""What a run commits beside its records: the step, the random state, how often it went back, the loop's own.

Owns how that is read back. Nothing read here is trusted: it comes from a manifest or a snapshot, whose
checksum guards against accidents and not against somebody who can write to the drive. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import StateError

__all__ = ["ResumePoint", "count_in", "read_resume_point"]

# As generations: far above any count, and small enough that nothing overflows.
_MAX_COUNT = 1 << 62


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A committed point of training.

    Attributes:
        step: optimizer steps done.
        rng: the random state, for `restore_rng`, which checks it.
        user: the training loop's own state.
        rollbacks: how often the run went back.
    """

    step: int
    rng: Mapping[str, Any]
    user: Mapping[str, Any]
    rollbacks: int = 0


def read_resume_point(state: Mapping[str, Any], what: str) -> ResumePoint:
    """Return the point of training that a committed state describes.

    Args:
        state: as it was committed.
        what: whose state it is, "run ...", for the message.

    Raises:
        StateError: it is not the state of a run of ours; names the value.
    """
    return ResumePoint(
        step=count_in(state, "step", what),
        rng=_mapping(state, "rng", what),
        user=_mapping(state, "user", what),
        rollbacks=count_in(state, "rollbacks", what, default=0),
    )


def count_in(state: Mapping[str, Any], key: str, what: str, *, default: int | None = None) -> int:
    """Return a count that a committed state holds.

    Raises:
        StateError: it is not a whole number from 0 to 2^62.
    """
    value = state.get(key, default)
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise StateError(
            f"{what} cannot be resumed: its committed {key!r} is {_shown(value)}, and not a count; go back"
            " to the generation before with 'offload verify --fall-back', or restore the run from a backup"
        )
    return value


def _mapping(state: Mapping[str, Any], key: str, what: str) -> Mapping[str, Any]:
    value = state.get(key)
    if not isinstance(value, Mapping):
        raise StateError(
            f"{what} cannot be resumed: its committed {key!r} is {_shown(value)}, and not an object; go back"
            " to the generation before with 'offload verify --fall-back', or restore the run from a backup"
        )
    return value


def _shown(value: object) -> str:
    """Return what a value is, short whatever it holds."""
    return f"{value!r:.40}" if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
