"""Bytes on loan: budgets, page-aligned host arenas, pools of slots and heaps. No torch, no I/O."""

from .arena import PAGE_NBYTES, Arena, Partition
from .budget import Budget
from .free_ranges import FreeRanges
from .heap import Heap
from .lease import POISON, Lease, Region
from .pool import Pool

__all__ = [
    "PAGE_NBYTES",
    "POISON",
    "Arena",
    "Budget",
    "FreeRanges",
    "Heap",
    "Lease",
    "Partition",
    "Pool",
    "Region",
]
