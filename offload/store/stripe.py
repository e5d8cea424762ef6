"""Where the chunks of records lie on the drives: pure arithmetic, no I/O.

The chunks of all records, in table order, are numbered from 0 without gaps: the *global chunk number*.
Chunk g lies on drive `deal[g mod len(deal)]`, so a record of many chunks uses every drive in proportion
to its weight, and many records of one chunk each do as well. The chunks that one record has on one
drive are contiguous there: an extent is one run of bytes per drive. A mutable record has two extents
with the same dealing and different offsets.

Invariants, held by property tests: every chunk has one place, places do not overlap, every offset is a
multiple of 4096, and at any prefix of the deal each drive's share is within one chunk of its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite, lcm

from ..aio.engine import ALIGNMENT_NBYTES

__all__ = ["MAX_DEAL", "Deal", "Run", "Stripe", "deal_by_weight", "pack_extents"]

# A longer cycle follows the weights more closely: 256 is within 0.2 % of any ratio of bandwidths,
# far below the noise of measuring them, and is one kilobyte of a manifest.
MAX_DEAL = 256


@dataclass(frozen=True, slots=True)
class Deal:
    """The cycle in which chunks are dealt to drives.

    Attributes:
        order: drive indices; chunk g goes to `order[g % len(order)]`.
        num_drives: how many drives there are; one that is not in `order` gets no chunks.
    """

    order: tuple[int, ...]
    num_drives: int
    _ranks: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.order) <= MAX_DEAL:
            raise ValueError(f"a deal has 1 to {MAX_DEAL} entries, got {len(self.order)}")
        if not all(0 <= drive < self.num_drives for drive in self.order):
            raise ValueError(f"a deal over {self.num_drives} drives names a drive that is not there")
        ranks = []
        for drive in range(self.num_drives):
            rank = [0]
            for dealt in self.order:
                rank.append(rank[-1] + (dealt == drive))
            ranks.append(tuple(rank))
        object.__setattr__(self, "_ranks", tuple(ranks))

    def drive(self, chunk: int) -> int:
        """Return the drive of global chunk `chunk`."""
        return self.order[chunk % len(self.order)]

    def share(self, drive: int) -> float:
        """Return the part of all chunks that lie on `drive`, from 0 to 1."""
        return self._ranks[drive][-1] / len(self.order)

    def count(self, drive: int, chunk: int) -> int:
        """Return how many of the global chunks below `chunk` lie on `drive`."""
        cycles, rest = divmod(chunk, len(self.order))
        rank = self._ranks[drive]
        return cycles * rank[-1] + rank[rest]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive chunks of a record that lie contiguously on one drive: one I/O request.

    Attributes:
        drive: index of the drive.
        first: the record's chunk that it begins with.
        end: one past its last chunk.
        offset_bytes: where it begins, from the start of the record's extent on that drive.
        nbytes: its length.
    """

    drive: int
    first: int
    end: int
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stripe:
    """How one record is cut into chunks and dealt to drives; the same for each of its extents.

    Attributes:
        nbytes: the record's length, a positive multiple of 4096.
        chunk_nbytes: length of every chunk but the last, which may be shorter.
        first_chunk: global number of the record's chunk 0.
        deal: the store's deal.
    """

    nbytes: int
    chunk_nbytes: int
    first_chunk: int
    deal: Deal

    @property
    def num_chunks(self) -> int:
        """Chunks of the record, the short last one included."""
        return -(-self.nbytes // self.chunk_nbytes)

    def chunk_span(self, chunk: int) -> tuple[int, int]:
        """Return where `chunk` begins and ends, in bytes from the record's start."""
        begin = chunk * self.chunk_nbytes
        return begin, min(begin + self.chunk_nbytes, self.nbytes)

    def place(self, chunk: int) -> tuple[int, int]:
        """Return the drive of `chunk` and its byte offset in the record's extent there."""
        number = self.first_chunk + chunk
        drive = self.deal.drive(number)
        slot = self.deal.count(drive, number) - self.deal.count(drive, self.first_chunk)
        return drive, slot * self.chunk_nbytes

    def drive_nbytes(self, drive: int) -> int:
        """Return the length of one extent of the record on `drive`."""
        end = self.first_chunk + self.num_chunks
        num_chunks = self.deal.count(drive, end) - self.deal.count(drive, self.first_chunk)
        if self.deal.drive(end - 1) == drive:
            return num_chunks * self.chunk_nbytes - (self.num_chunks * self.chunk_nbytes - self.nbytes)
        return num_chunks * self.chunk_nbytes

    def runs(self, first: int, end: int, max_nbytes: int) -> Iterator[Run]:
        """Yield the runs that cover chunks `first` to `end`, in order, none longer than `max_nbytes`.

        A single chunk longer than `max_nbytes` is a run of its own.
        """
        limit = max(1, max_nbytes // self.chunk_nbytes)
        while first < end:
            drive, offset_bytes = self.place(first)
            stop = first + 1
            while stop < end and stop - first < limit and self.deal.drive(self.first_chunk + stop) == drive:
                stop += 1
            nbytes = self.chunk_span(stop - 1)[1] - self.chunk_span(first)[0]
            yield Run(drive, first, stop, offset_bytes, nbytes)
            first = stop


def deal_by_weight(weights: Sequence[float]) -> Deal:
    """Return the deal that follows `weights` most closely; the shortest one among equals.

    Args:
        weights: one positive number per drive, its bandwidth in any unit.

    Raises:
        ValueError: no weights, or one that is not positive and finite.

    Source: within the cycle chunk k goes to the drive whose next chunk has the earliest deadline among
    those not ahead of their part (Pfair scheduling on one processor, Baruah et al. 1996), which keeps
    every prefix within one chunk of proportion.

    >>> deal_by_weight([1, 1]).order, deal_by_weight([2.0, 1.0]).order
    ((0, 1), (0, 0, 1))
    """
    if not weights or not all(isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights must be positive numbers, one a drive: got {list(weights)}")
    # Whole numbers in the same proportion: a float is a fraction, and its arithmetic is then exact.
    fractions = [Fraction(weight) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    parts = [int(fraction * scale) for fraction in fractions]
    total = sum(parts)
    best: list[int] = []
    best_error, best_length = 2 * total, 1
    for length in range(1, MAX_DEAL + 1):
        shares = _apportion(parts, total, length)
        error = max(abs(share * total - part * length) for share, part in zip(shares, parts, strict=True))
        # The error in proportion is error / (total * length).
        if error * best_length < best_error * length:
            best, best_error, best_length = shares, error, length
        if error == 0:
            break
    return Deal(_spread(best), len(weights))


def pack_extents(stripes: Sequence[Stripe], extents: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Lay extents end to end on every drive.

    Args:
        stripes: the records in table order.
        extents: how many extents each has, 1 or 2.

    Returns:
        For each record, for each of its extents, its byte offset in each drive's data file.
    """
    num_drives = stripes[0].deal.num_drives if stripes else 0
    ends = [0] * num_drives
    offsets: list[list[tuple[int, ...]]] = []
    for stripe, num_extents in zip(stripes, extents, strict=True):
        lengths = [stripe.drive_nbytes(drive) for drive in range(num_drives)]
        assert all(length % ALIGNMENT_NBYTES == 0 for length in lengths)
        of_record = []
        for _ in range(num_extents):
            of_record.append(tuple(ends))
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        offsets.append(of_record)
    return offsets


def _apportion(parts: Sequence[int], total: int, length: int) -> list[int]:
    """Cut `length` into whole shares by largest remainder, the lower drive first among equals."""
    shares = [part * length // total for part in parts]
    remainders = [part * length % total for part in parts]
    for drive in sorted(range(len(parts)), key=lambda drive: -remainders[drive])[: length - sum(shares)]:
        shares[drive] += 1
    return shares


def _spread(shares: Sequence[int]) -> tuple[int, ...]:
    length = sum(shares)
    counts = [0] * len(shares)
    order = []
    for step in range(1, length + 1):
        due = [d for d, share in enumerate(shares) if counts[d] * length < step * share]
        drive = min(due, key=lambda d: (-(-(counts[d] + 1) * length // shares[d]), d))
        counts[drive] += 1
        order.append(drive)
    return tuple(order)
