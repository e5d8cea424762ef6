"""Where each parked gradient waits for its update: in host memory, or on disk. A pure function.

A gradient on disk is written once and read once, in the backward and in the update of its step: 8 bytes
over the drives' link for each parameter with fp32 gradients, 4 with bf16 ones. So as many bytes as fit
stay in host memory. The rest passes through two small sets of slots: a *ring* of whole gradients on their
way to disk, and *parts* of gradients, one for each optimizer chunk, on their way back.

[Note: which gradients stay] The ring's slots are as large as the largest gradient that goes to disk, so
an outsize one (an embedding) that stays makes every slot of the ring smaller: each possible size of the
ring is tried, and the one that leaves the most bytes in memory is taken. Among the rest those stay that
cost the most bytes on disk for their size (a tied embedding's is written and read for every unit that
adds to it), then those whose updates come first. Updates run in the order of the next forward, which is
the reverse of backward's: the first of them are the last to arrive, so on disk they would be read back as
soon as they are written, when nothing else has work. Less than the smallest gradient left out stays unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from ..sizes import MIB, align_down, align_up

__all__ = ["GradientHomes", "PartLayout", "choose_homes"]

_ALIGNMENT_NBYTES = 4096

# What one checksum of a gradient covers, and what one drive gets at a time, as in the store.
_MAX_CHUNK_NBYTES = 4 * MIB
# Where optimizer chunks do not begin at multiples of 4096 bytes of the gradient.
_ODD_CHUNK_NBYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class GradientHomes:
    """The answer.

    Attributes:
        host: owners whose gradient stays in host memory.
        disk: owners whose gradient goes to disk.
        ring: slots for whole gradients on their way to disk, in bytes.
        parts: slots for parts of gradients on their way back, in bytes.
    """

    host: tuple[str, ...]
    disk: tuple[str, ...] = ()
    ring: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    @property
    def transit_nbytes(self) -> int:
        """Host bytes of the ring and the parts."""
        return sum(self.ring) + sum(self.parts)


@dataclass(frozen=True, slots=True)
class PartLayout:
    """How a gradient on disk is cut.

    Attributes:
        chunk_numel: elements of an optimizer chunk.
        itemsize: bytes of a gradient element.
    """

    chunk_numel: int
    itemsize: int

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of a chunk on disk: a divisor of a part's where there is one, so that parts are read alone.

        >>> PartLayout(1 << 21, 4).chunk_nbytes, PartLayout(3 << 18, 2).chunk_nbytes
        (4194304, 524288)
        """
        common = gcd(self.chunk_numel * self.itemsize, _MAX_CHUNK_NBYTES)
        return common if common >= _ALIGNMENT_NBYTES else _ODD_CHUNK_NBYTES

    def record_nbytes(self, numel: int) -> int:
        """Return the bytes on disk of a gradient of `numel` elements."""
        return align_up(numel * self.itemsize, _ALIGNMENT_NBYTES)

    def part(self, start: int, stop: int, numel: int) -> tuple[int, int]:
        """Return the first byte and the length of what is read for elements [start, stop) of `numel`."""
        begin = align_down(start * self.itemsize, self.chunk_nbytes)
        end = min(align_up(stop * self.itemsize, self.chunk_nbytes), self.record_nbytes(numel))
        return begin, end - begin

    def max_part_nbytes(self, numel: int) -> int:
        """Return a length that no part of a gradient of `numel` elements exceeds."""
        part_nbytes = self.chunk_numel * self.itemsize
        if part_nbytes % self.chunk_nbytes:
            # Neither its begin nor its end is that of a chunk on disk.
            part_nbytes = align_up(part_nbytes, self.chunk_nbytes) + self.chunk_nbytes
        return min(part_nbytes, self.record_nbytes(numel))


def choose_homes(
    sizes: Mapping[str, int],
    *,
    order: Sequence[str],
    shared: Sequence[str],
    capacity_nbytes: int,
    ring: int,
    parts: Sequence[int],
) -> GradientHomes | None:
    """Return which gradients stay in host memory; see [Note: which gradients stay].

    Args:
        sizes: bytes of each gradient's slot, by owner.
        order: the owners in the order of their updates.
        shared: those that several units add to.
        capacity_nbytes: host bytes for gradients, ring and parts together.
        ring: slots of the ring.
        parts: slots for parts, in bytes.

    Returns:
        The homes; None when not even the ring and the parts fit.
    """
    ranked = sorted(sizes, key=lambda owner: (owner not in shared, _place(order, owner)))
    if sum(sizes.values()) <= capacity_nbytes:
        return GradientHomes(tuple(ranked))
    best: GradientHomes | None = None
    most_nbytes = -1
    for largest in sorted(set(sizes.values())):
        host = [owner for owner in ranked if sizes[owner] > largest]
        free = capacity_nbytes - ring * largest - sum(parts) - sum(sizes[owner] for owner in host)
        if free < 0:
            continue
        disk = []
        for owner in (owner for owner in ranked if sizes[owner] <= largest):
            if sizes[owner] <= free:
                free -= sizes[owner]
                host.append(owner)
            else:
                disk.append(owner)
        nbytes = sum(sizes[owner] for owner in host)
        if disk and nbytes > most_nbytes:
            best = GradientHomes(tuple(host), tuple(disk), (largest,) * ring, tuple(parts))
            most_nbytes = nbytes
    return best


def _place(order: Sequence[str], owner: str) -> int:
    return order.index(owner) if owner in order else len(order)
