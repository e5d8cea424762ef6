"""How a setting is put to the test: how large the requests are, how many, and where. Pure.

[Note: keeping the queue full]
The engine cuts a request into segments of the setting's block size and keeps `queue_depth` of them in
flight, across requests, as long as it has been given enough. So several requests are outstanding, and
all but one of them hold at least as many bytes as the queue does: while one is being waited for and
submitted again, the queue does not run dry. What a setting cannot be given in the memory or the file at
hand is not measured, rather than measured wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..aio.engine import Op
from ..machine import IoSetting
from ..sizes import MIB, align_down
from .content import PERIOD_NBYTES
from .results import Pattern

__all__ = ["Region", "Requests", "plan_requests", "regions_of"]

# Small blocks still travel in large requests, as they do when a model's records are moved: the cost of
# a request in Python is then nothing beside its transfer.
_LARGE_NBYTES = 8 * MIB

_NUM_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests of one drive.

    Attributes:
        nbytes: of each, a multiple of the block size and of the content's period.
        num_outstanding: how many at once, even.
    """

    nbytes: int
    num_outstanding: int

    @property
    def buffer_nbytes(self) -> int:
        """Memory that they need."""
        return self.nbytes * self.num_outstanding


@dataclass(frozen=True, slots=True)
class Region:
    """The part of the file that is read, or written.

    Attributes:
        op: which of the two.
        start: its first byte.
        nbytes: its size.
    """

    op: Op
    start: int
    nbytes: int

    def offsets(self, request_nbytes: int, first: int = 0) -> Iterator[int]:
        """Yield file offsets of requests for ever, front to back, over and over.

        Args:
            request_nbytes: size of each; the region holds at least one.
            first: begin at the request that holds this offset of the file, when it is inside.
        """
        num = self.nbytes // request_nbytes
        index = max(0, first - self.start) // request_nbytes
        while True:
            yield self.start + index % num * request_nbytes
            index += 1


def regions_of(pattern: Pattern, file_nbytes: int) -> tuple[Region, ...]:
    """Return the parts of the file that a workload uses; requests alternate between them."""
    if pattern != "mixed":
        return (Region(pattern, 0, file_nbytes),)
    half = align_down(file_nbytes // 2, PERIOD_NBYTES)
    return Region("read", 0, half), Region("write", half, half)


def plan_requests(
    setting: IoSetting, pattern: Pattern, *, file_nbytes: int, buffer_nbytes: int
) -> Requests | None:
    """Choose the requests that keep a setting's queue full; None when the room does not suffice.

    Args:
        setting: its block size is a power of two.
        pattern: `mixed` has half of the file for each direction.
        file_nbytes: size of the file.
        buffer_nbytes: memory for this drive.
    """
    in_flight_nbytes = setting.segment_nbytes * setting.queue_depth
    smallest = max(setting.segment_nbytes, PERIOD_NBYTES)
    regions = regions_of(pattern, file_nbytes)
    nbytes = max(smallest, _LARGE_NBYTES, _power_of_two(in_flight_nbytes) // 2)
    while nbytes >= smallest:
        requests = Requests(nbytes, _NUM_REQUESTS)
        fits = requests.buffer_nbytes <= buffer_nbytes and all(
            # No two requests in flight may overlap, so a region holds all that are in it at once.
            requests.buffer_nbytes // len(regions) <= region.nbytes
            for region in regions
        )
        if fits:
            # See [Note: keeping the queue full].
            return requests if nbytes * (_NUM_REQUESTS - 1) >= in_flight_nbytes else None
        nbytes //= 2
    return None


def _power_of_two(nbytes: int) -> int:
    """Return the smallest power of two that is at least `nbytes`."""
    return 1 << (nbytes - 1).bit_length()
