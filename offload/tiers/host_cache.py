"""Which records are kept in host memory when their home is the disk. A pure function.

[Note: which records are cached] A step sweeps all records in order, so those used least recently are
used next: a cache that evicts them has none of them when their turn comes. The choice is made once, then,
and holds for the run. First come the records that save most bytes a step for each byte of memory: weights
are read two or three times and written once, optimizer records read once and written once. Among those that
save alike, the cached ones are spread evenly over the order, so that records in memory and records that are
read take turns, and the drives are neither overrun nor idle for long. What is left over, less than a weights
record, goes to the optimizer records, which are cut at their chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from .fetches import Fetches
from .records import RecordSet
from .residency import Residency

__all__ = ["choose_cached"]

# Bytes read and written a step for each byte of an optimizer record.
OPTIMIZER_WORTH = 2.0


def choose_cached(
    records: Mapping[str, RecordSet],
    fetches: Fetches,
    *,
    order: Sequence[str],
    parks: bool,
    capacity_nbytes: int,
) -> Residency:
    """Return what to keep in host memory; see [Note: which records are cached].

    Args:
        records: by owner.
        fetches: how often a step fetches each.
        order: all owners, in the order of their first use.
        parks: whether updates run between passes, and read the weights for themselves.
        capacity_nbytes: the most bytes that it may take.

    Returns:
        As much as fits: all records, or less by no more than the optimizer chunk that did not fit.
    """
    free = capacity_nbytes
    chosen: set[str] = set()
    chunks: dict[str, int] = {}
    sizes = {owner: records[owner].host_nbytes for owner in order}
    worth = {owner: _worth(records[owner], fetches, parks=parks) for owner in order}
    # What saves most a byte comes first; weights before optimizer records that save as much.
    for level in sorted({*worth.values(), OPTIMIZER_WORTH}, reverse=True):
        alike = [owner for owner in order if worth[owner] == level]
        taken = _spread({owner: sizes[owner] for owner in alike}, free)
        chosen.update(taken)
        free -= sum(sizes[owner] for owner in taken)
        if level == OPTIMIZER_WORTH:
            chunks = _spread_chunks({owner: records[owner] for owner in order}, free)
            free -= Residency(chunks=chunks).nbytes(records)
    return Residency(frozenset(chosen), chunks)


def _worth(unit: RecordSet, fetches: Fetches, *, parks: bool) -> float:
    """Return the bytes that a step reads and writes for each byte of a unit's weights and frozen records."""
    reads = fetches.all.get(unit.owner, 0) - fetches.handed_over.get(unit.owner, 0)
    if parks and unit.layout.trainable:
        reads += 1
    # Rounded: units of one kind may differ by some padding.
    return round(reads + unit.weights_nbytes / unit.host_nbytes, 1)


def _spread(sizes: Mapping[str, int], capacity_nbytes: int) -> list[str]:
    """Return the keys of `sizes` to take: at even distances, as many as fit."""
    total = sum(sizes.values())
    if total <= capacity_nbytes:
        return list(sizes)
    taken: dict[str, None] = {}
    nbytes = passed = 0
    for key, size in sizes.items():
        passed += size
        if nbytes + size <= capacity_nbytes * passed // total:
            taken[key] = None
            nbytes += size
    # Where sizes differ, a smaller one may still fit.
    for key in _that_fit(sizes, taken, capacity_nbytes - nbytes):
        taken[key] = None
    return list(taken)


def _that_fit(sizes: Mapping[str, int], taken: Iterable[str], free_nbytes: int) -> Iterator[str]:
    for key in [key for key in sizes if key not in taken]:
        if sizes[key] <= free_nbytes:
            free_nbytes -= sizes[key]
            yield key


def _spread_chunks(records: Mapping[str, RecordSet], capacity_nbytes: int) -> dict[str, int]:
    """Return how many chunks of each optimizer record to take: evenly, to the last chunk that fits."""
    total = sum(unit.optimizer_nbytes for unit in records.values())
    counts = dict.fromkeys(records, 0)
    nbytes = passed = 0
    for owner, unit in records.items():
        passed += unit.optimizer_nbytes
        limit = min(capacity_nbytes, capacity_nbytes * passed // max(total, 1))
        for chunk in unit.chunks:
            if nbytes + chunk.nbytes > limit:
                break
            nbytes += chunk.nbytes
            counts[owner] += 1
    for owner, unit in records.items():
        for chunk in unit.chunks[counts[owner] :]:
            if nbytes + chunk.nbytes > capacity_nbytes:
                break
            nbytes += chunk.nbytes
            counts[owner] += 1
    return {owner: count for owner, count in counts.items() if count}
