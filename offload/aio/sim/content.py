"""The bytes of one file on a simulated disk: what is durable, and what a volatile cache holds over it.

Invariants:
- A reader sees the cache where it has a sector, else the durable sector, else zeros.
- A dirty sector becomes durable at a flush. One that a failed flush left behind is clean: it may still
  be read, and no later flush makes it durable (Linux drops the dirty state of pages it could not write).
- Sectors are whole; bytes of one that lie past the size are never delivered.

Thread rule: none of its own; the disk's lock covers it. No randomness but the generator handed in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

__all__ = ["SimContent"]


class SimContent:
    """The sectors and sizes of one file."""

    def __init__(self, sector_nbytes: int) -> None:
        self._sector_nbytes = sector_nbytes
        self._zeros = bytes(sector_nbytes)
        self._durable: dict[int, bytes] = {}
        self._cached: dict[int, bytes] = {}
        self._dirty: set[int] = set()
        self._num_reserved = 0  # sectors from the start that have room
        self._num_beyond = 0  # written sectors behind those
        self._durable_shape = (0, 0)  # size and reserved sectors
        self.size_nbytes = 0

    @property
    def used_nbytes(self) -> int:
        """Room it takes on the disk."""
        return (self._num_reserved + self._num_beyond) * self._sector_nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return what a reader sees; shorter at the end of the file."""
        stop = min(offset + nbytes, self.size_nbytes)
        if stop <= offset:
            return b""
        first = offset // self._sector_nbytes
        sectors = [self._sector(index) for index in range(first, -(-stop // self._sector_nbytes))]
        start = first * self._sector_nbytes
        return b"".join(sectors)[offset - start : stop - start]

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put bytes in the cache; the file grows to hold them."""
        for index, sector in self._merged(offset, data):
            self._put(index, sector)
        self.size_nbytes = max(self.size_nbytes, offset + len(data))

    def write_some(self, offset: int, data: memoryview | bytes, rng: random.Random) -> None:
        """Put some sectors of a write in the cache: those that overwrite others, each by a coin."""
        last = self.size_nbytes // self._sector_nbytes  # of those that are inside as a whole
        for index, sector in self._merged(offset, data):
            if index < last and self._has_room(index) and rng.random() < 0.5:
                self._put(index, sector)

    def room_for(self, offset: int, nbytes: int, free_nbytes: int) -> int:
        """Return how many bytes of a write fit, from its start, where `free_nbytes` are free."""
        num_free = free_nbytes // self._sector_nbytes
        first, last = offset // self._sector_nbytes, (offset + nbytes - 1) // self._sector_nbytes
        for index in range(first, last + 1):
            if not self._has_room(index):
                num_free -= 1
                if num_free < 0:
                    return max(0, index * self._sector_nbytes - offset)
        return nbytes

    def missing_for(self, nbytes: int) -> int:
        """Return how many bytes of room a reservation of the first `nbytes` would take."""
        num_wanted = -(-nbytes // self._sector_nbytes)
        if num_wanted <= self._num_reserved:
            return 0
        num_there = sum(1 for index in self._written() if self._num_reserved <= index < num_wanted)
        return (num_wanted - self._num_reserved - num_there) * self._sector_nbytes

    def reserve(self, nbytes: int) -> None:
        """Take room for the first `nbytes`, and grow the file to that."""
        self._num_reserved = max(self._num_reserved, -(-nbytes // self._sector_nbytes))
        self._count_beyond()
        self.size_nbytes = max(self.size_nbytes, nbytes)

    def replace(self, data: bytes) -> None:
        """Forget everything, and hold these bytes durably."""
        self._durable, self._cached, self._num_reserved, self.size_nbytes = {}, {}, 0, 0
        self._dirty.clear()
        self._num_beyond = 0
        self.write(0, data)
        self.flush()

    def flush(self) -> None:
        """Make everything in the cache durable."""
        for index in self._dirty:
            self._durable[index] = self._cached.pop(index)
        self._dirty.clear()
        self._durable_shape = (self.size_nbytes, self._num_reserved)

    def flush_some(self, rng: random.Random) -> None:
        """Make some of it durable, as a flush that was interrupted."""
        for index in sorted(self._dirty):
            if rng.random() < 0.5:
                self._durable[index] = self._cached.pop(index)
                self._dirty.discard(index)

    def fail_flush(self, rng: random.Random) -> None:
        """Flush and fail: each dirty sector is durable, or only in the cache from now on, or gone."""
        for index in sorted(self._dirty):
            fate = rng.randrange(3)
            if fate == 0:
                self._durable[index] = self._cached.pop(index)
            elif fate == 1:
                self._cached.pop(index)
        self._dirty.clear()
        self._count_beyond()

    def flip_bit(self, offset: int, bit: int) -> None:
        """Turn one bit at rest over, in the cache as well as on the disk."""
        index, within = divmod(offset, self._sector_nbytes)
        for sectors in (self._durable, self._cached):
            if index in sectors:
                changed = bytearray(sectors[index])
                changed[within] ^= 1 << bit
                sectors[index] = bytes(changed)

    def copy(self) -> SimContent:
        """Return the same sectors, cache and all, which change independently from now on."""
        other = SimContent(self._sector_nbytes)
        other._durable, other._cached = dict(self._durable), dict(self._cached)
        other._dirty = set(self._dirty)
        other._num_reserved, other._num_beyond = self._num_reserved, self._num_beyond
        other._durable_shape, other.size_nbytes = self._durable_shape, self.size_nbytes
        return other

    def after_power_loss(self, rng: random.Random) -> SimContent:
        """Return what is left without power: the durable sectors, and of the dirty ones what `rng` says.

        Each dirty sector is as before, as written, or torn: a mixture of both, or, seldom, garbage (in
        "Understanding the Robustness of SSDs under Power Fault", FAST 2013, drives showed shorn writes
        and corrupted bits). The size is the durable one or the newest.
        """
        left = SimContent(self._sector_nbytes)
        left._durable = dict(self._durable)
        for index in sorted(self._dirty):
            old, new = self._durable.get(index, self._zeros), self._cached[index]
            left._durable[index] = self._torn(old, new, rng)
        newest = (self.size_nbytes, self._num_reserved)
        left._durable_shape = rng.choice((self._durable_shape, newest))
        left.size_nbytes, left._num_reserved = left._durable_shape
        left._cut_to_size()
        return left

    def _torn(self, old: bytes, new: bytes, rng: random.Random) -> bytes:
        fate, cut = rng.random(), rng.randrange(1, self._sector_nbytes)
        if fate < 0.4:
            return old
        if fate < 0.8:
            return new
        if fate < 0.95:
            return rng.choice((old[:cut] + new[cut:], new[:cut] + old[cut:]))
        return rng.randbytes(self._sector_nbytes)

    def _cut_to_size(self) -> None:
        last, within = divmod(self.size_nbytes, self._sector_nbytes)
        self._durable = {index: data for index, data in self._durable.items() if index <= last}
        if last in self._durable:
            kept = self._durable.pop(last)[:within]
            if kept:
                self._durable[last] = kept + self._zeros[within:]
        self._count_beyond()

    def _count_beyond(self) -> None:
        self._num_beyond = sum(1 for index in self._written() if index >= self._num_reserved)

    def _written(self) -> set[int]:
        return self._durable.keys() | self._cached.keys()

    def _has_room(self, index: int) -> bool:
        return index < self._num_reserved or index in self._cached or index in self._durable

    def _sector(self, index: int) -> bytes:
        found = self._cached.get(index)
        return self._durable.get(index, self._zeros) if found is None else found

    def _put(self, index: int, sector: bytes) -> None:
        if not self._has_room(index):
            self._num_beyond += 1
        self._cached[index] = sector
        self._dirty.add(index)

    def _merged(self, offset: int, data: memoryview | bytes) -> Iterator[tuple[int, bytes]]:
        """Yield each sector that a write touches, as it is afterwards."""
        first, lead = divmod(offset, self._sector_nbytes)
        whole = bytes(data)
        if lead:
            whole = self._sector(first)[:lead] + whole
        if rest := len(whole) % self._sector_nbytes:
            whole += self._sector(first + len(whole) // self._sector_nbytes)[rest:]
        for index, start in enumerate(range(0, len(whole), self._sector_nbytes), first):
            yield index, whole[start : start + self._sector_nbytes]
