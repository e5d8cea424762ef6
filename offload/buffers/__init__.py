"""Bytes on loan: budgets, page-aligned host arenas, pools of slots and stacks. No torch, no I/O."""

from .arena import PAGE_NBYTES, Arena, Partition
from .budget import Budget
from .lease import POISON, Lease, Region
from .pool import Pool
from .stack import Stack

__all__ = ["PAGE_NBYTES", "POISON", "Arena", "Budget", "Lease", "Partition", "Pool", "Region", "Stack"]
