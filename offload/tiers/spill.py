"""Room on a run's drives for saved inputs that host memory does not hold: written, read back, given back.

Owns which bytes of the room are free. An input gets a record of its own in a scratch area, as long as the
input is: neither its size nor how many there will be is known before the model runs. When one goes, and when
it comes back, is decided in `activations.py`.

Invariants: an input is read as it was written or not at all; its place on disk is another's only when nothing
is in flight there; memory belongs to a transfer until `wait` or `free` has returned.

Thread rule: the thread that runs the model; forward and backward do not overlap.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..buffers import Arena, FreeRanges, Lease
from ..errors import OffloadError, RequestTimeoutError
from ..sizes import MIB, align_down, align_up, format_bytes
from ..store import RecordSpec, Ticket
from ..store.scratch import Scratch
from ..trace import Tracer

__all__ = ["Spill", "Spilled", "chunk_nbytes_of", "room_nbytes"]

# The record that all inputs are carved out of.
_ROOM = "saved-inputs"

# An input begins at a chunk, so it takes a chunk more than it is at most: small chunks for little room. As
# in the store, 4 MiB is what one checksum covers, and what one drive gets at a time.
_MIN_CHUNK_NBYTES, _MAX_CHUNK_NBYTES = 4096, 4 * MIB
_CHUNKS_OF_ROOM = 1024


@dataclass(slots=True)
class _Transfer:
    ticket: Ticket
    track: str
    issued_s: float


class Spilled:
    """A saved input on disk, or on its way there or back.

    Attributes:
        holder: the unit's name, for messages.
        nbytes: of its record.
        is_read: whether its bytes were asked for since they were written.
    """

    __slots__ = ("_name", "_offset", "_transfer", "holder", "is_read", "nbytes")

    def __init__(self, holder: str, nbytes: int, name: str, offset: int) -> None:
        self.holder = holder
        self.nbytes = nbytes
        self.is_read = False
        self._name = name
        self._offset = offset
        self._transfer: _Transfer | None = None


class Spill:
    """See the module.

    Args:
        scratch: made with `Spill.record`.
        host: the arena of the memory that inputs come from and go to.
        trace: counts the bytes.
    """

    def __init__(self, scratch: Scratch, host: Arena, trace: Tracer) -> None:
        self._scratch = scratch
        self._host = host
        self._trace = trace
        self.nbytes = scratch.records[_ROOM].nbytes
        self._free = FreeRanges(self.nbytes)
        self._num_written = 0

    @staticmethod
    def record(nbytes: int) -> RecordSpec:
        """Return the record to make a scratch area with, for about `nbytes` of room; whole chunks of it."""
        chunk_nbytes = chunk_nbytes_of(nbytes)
        return RecordSpec(_ROOM, max(chunk_nbytes, align_down(nbytes, chunk_nbytes)))

    def write(self, lease: Lease, holder: str) -> Spilled | None:
        """Begin to write the input that `lease` holds, all of whose bytes have arrived; None without room.

        Args:
            lease: of whole pages; it must not change, nor be released, until `wait` or `free` has returned.
            holder: the unit's name, for messages.

        Raises:
            StorageError: it cannot be written, or an earlier one was not.
        """
        offset = self._free.take(self._taken(lease.nbytes))
        if offset is None:
            return None
        name = f"input-{self._num_written}"
        self._num_written += 1
        self._scratch.carve(RecordSpec(name, lease.nbytes), within=_ROOM, offset=offset)
        spilled = Spilled(holder, lease.nbytes, name, offset)
        issued_s = time.perf_counter()
        ticket = self._scratch.write(name, self._host.view(lease))
        spilled._transfer = _Transfer(ticket, "disk write", issued_s)
        self._trace.count("disk_written_nbytes", spilled.nbytes)
        self._trace.count("activations_written_nbytes", spilled.nbytes)
        return spilled

    def read(self, spilled: Spilled, lease: Lease) -> None:
        """Begin to read an input back into `lease`, which is as long as that of its `write`.

        Raises:
            StorageError: it cannot be read, or a write has failed.
        """
        assert spilled._transfer is None, "memory that it was written from is not given back unwaited for"
        issued_s = time.perf_counter()
        ticket = self._scratch.read(spilled._name, self._host.view(lease))
        spilled._transfer = _Transfer(ticket, "disk read", issued_s)
        spilled.is_read = True
        self._trace.count("disk_read_nbytes", spilled.nbytes)
        self._trace.count("activations_read_nbytes", spilled.nbytes)

    def in_flight(self, spilled: Spilled) -> bool:
        """Return whether it is being written or read, without blocking."""
        return spilled._transfer is not None and not spilled._transfer.ticket.done()

    def wait(self, spilled: Spilled) -> None:
        """Wait until nothing of it is in flight; its memory is the caller's again, also after an error.

        Raises:
            CorruptionError: what was read is not what was written.
            StorageError: the transfer failed.
            RequestTimeoutError: it goes on; its memory is not to be touched.
        """
        transfer = spilled._transfer
        if transfer is None:
            return
        try:
            transfer.ticket.wait()
        except RequestTimeoutError:
            raise
        except OffloadError:
            spilled._transfer = None
            raise
        spilled._transfer = None
        ended_s = transfer.ticket.finished_s or transfer.issued_s
        name = f"{spilled.holder} input"
        self._trace.add(transfer.track, name, transfer.issued_s, ended_s, nbytes=spilled.nbytes)

    def free(self, spilled: Spilled) -> None:
        """Wait as `wait` does, and give the room of an input back; it cannot be read any more."""
        try:
            self.wait(spilled)
        except RequestTimeoutError:
            raise
        except OffloadError:
            self._forget(spilled)
            raise
        self._forget(spilled)

    def refusal(self, nbytes: int, holder: str) -> str:
        """Return why there is no room for an input of `nbytes`, in numbers, and what to do."""
        used = self.nbytes - self._free.free_nbytes
        return (
            f"saved inputs: that of unit {holder!r} needs {format_bytes(nbytes)} ({nbytes:,} bytes) on disk,"
            f" where {format_bytes(used)} ({used:,} bytes) of {format_bytes(self.nbytes)} are taken; raise"
            " activations_disk_nbytes or activations_nbytes, or use a smaller batch"
        )

    def _forget(self, spilled: Spilled) -> None:
        self._scratch.drop(spilled._name)
        self._free.give(spilled._offset, self._taken(spilled.nbytes))

    def _taken(self, nbytes: int) -> int:
        return align_up(nbytes, self._scratch.chunk_nbytes)


def chunk_nbytes_of(nbytes: int) -> int:
    """Return the chunk length of a scratch area with room for `nbytes` of inputs: a power of two.

    >>> chunk_nbytes_of(100), chunk_nbytes_of(1 << 30), chunk_nbytes_of(1 << 40)
    (4096, 1048576, 4194304)
    """
    part = max(1, nbytes // _CHUNKS_OF_ROOM)
    return min(max(1 << (part.bit_length() - 1), _MIN_CHUNK_NBYTES), _MAX_CHUNK_NBYTES)


def room_nbytes(sizes: Sequence[int]) -> int:
    """Return the least room that holds inputs of these sizes at the same time, whatever their order.

    >>> room_nbytes([4096, 5000]), room_nbytes([])
    (12288, 0)
    """
    nbytes = 0
    while True:
        chunk_nbytes = chunk_nbytes_of(nbytes)
        needed = sum(align_up(size, chunk_nbytes) for size in sizes)
        if needed <= nbytes:
            return needed
        nbytes = needed
