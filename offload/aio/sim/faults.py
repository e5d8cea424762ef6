"""What goes wrong on a simulated disk, and when: faults by the number of the operation they hit.

Pure: a plan is asked about each operation in turn and answers with the kind of fault, or none. What a
fault does is in `offload.aio.sim.disk`.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Fault", "FaultKind", "FaultPlan", "Operation", "OperationKind", "SimCrash", "SimStuckError"]

OperationKind = Literal[
    "open",
    "allocate",
    "read",
    "write",
    "sync",
    # Of small files that lie on the same drive but not in this simulation; see `SimDisk.enter`.
    "look",  # at a name or at what it holds
    "create",
    "put",  # bytes into a small file
    "flush",  # of a small file or a directory
    "rename",
    "remove",
]
FaultKind = Literal[
    "short",  # a segment moves only a part of its bytes
    "flip",  # one bit of what a read delivers, or of what a write stores, is wrong
    "stuck",  # a segment does not complete before `SimDisk.unstick`, or `stuck_s` later
    "crash",  # the process ends before the operation (in the midst of a sync)
    "EIO",
    "ENOSPC",
    "EDQUOT",
    "EFBIG",
    "EROFS",
    "EINTR",
    "EAGAIN",
    "EINVAL",
]

# What a kind can happen to; of one that is not here, everything. It says nothing to other operations,
# which then go on: a test may try every kind at every operation.
_HAPPENS_TO: dict[FaultKind, frozenset[OperationKind]] = {
    "short": frozenset({"read", "write", "put"}),
    "flip": frozenset({"read", "write"}),
}


class SimCrash(BaseException):
    """The process ends here: nothing it does afterwards reaches the disk.

    A `BaseException`, as no code that handles errors can handle this.
    """


class SimStuckError(AssertionError):
    """Code under test waits without a timeout for what will never happen; a real engine would hang."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        operation: which one it hits, counted from 0.
        kind: what happens.
        of: what is counted: every operation of the journal, or those of one kind.
        forever: hit every later one as well.
    """

    operation: int
    kind: FaultKind
    of: OperationKind | Literal["any"] = "any"
    forever: bool = False

    @property
    def errno(self) -> int:
        """The error number it stands for; 0 where it is none."""
        return int(getattr(errno, self.kind, 0))

    def hits(self, what: OperationKind, index: int) -> bool:
        """Return whether it hits the operation that is the `index`-th of what it counts."""
        if what not in _HAPPENS_TO.get(self.kind, (what,)):
            return False
        return index == self.operation or (self.forever and index > self.operation)


@dataclass(frozen=True, slots=True)
class Operation:
    """An entry of the journal: one thing that was asked of the disk.

    Attributes:
        what: a segment is a `read` or `write`; what is resubmitted is an operation of its own.
        path: the file.
        offset_bytes: where a segment begins; 0 for the others.
        nbytes: of a segment or an allocation; 0 for the others.
        fault: what hit it.
    """

    what: OperationKind
    path: str
    offset_bytes: int = 0
    nbytes: int = 0
    fault: FaultKind | None = None


class FaultPlan:
    """The faults to come, and how many operations of each kind there were."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._faults = list(faults)
        self._num_seen: Counter[str] = Counter()

    def add(self, *faults: Fault) -> None:
        """Plan more; operations are still counted from the first."""
        self._faults += faults

    def clear(self) -> None:
        """Drop all faults."""
        self._faults.clear()

    def remove(self, kind: FaultKind) -> None:
        """Drop the faults of one kind."""
        self._faults = [fault for fault in self._faults if fault.kind != kind]

    def next(self, what: OperationKind) -> Fault | None:
        """Count one more operation and return the first fault that hits it."""
        indices = {"any": self._num_seen["any"], what: self._num_seen[what]}
        self._num_seen.update(indices.keys())
        for fault in self._faults:
            if fault.of in indices and fault.hits(what, indices[fault.of]):
                return fault
        return None
