"""Which inputs of units a step saves, and where they wait for backward. Pure.

The runtime keeps in host memory what its share of the budget holds, and sends those saved first to disk when
they do not all fit (`tiers/activations.py`); what it does is reckoned here, for a batch that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..sizes import align_up
from ..tiers.spill import room_nbytes
from .model import ModelFacts

__all__ = ["SavedInputs", "saved_inputs"]

# A saved input is a lease of whole pages.
_PAGE_NBYTES = 4096

# Inputs that host memory must hold for the drives to keep up: one that comes, one that goes, one at work.
_LEAST_IN_MEMORY = 3


@dataclass(frozen=True, slots=True)
class SavedInputs:
    """The inputs of a step.

    Attributes:
        sizes: bytes of each, in whole pages, in the order in which they are saved.
    """

    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(self.sizes)

    @property
    def least_nbytes(self) -> int:
        """Host memory that they can do with when the others go to disk."""
        return sum(sorted(self.sizes)[-_LEAST_IN_MEMORY:])

    def on_disk(self, memory_nbytes: int) -> Sequence[int]:
        """Return the sizes of those that go to disk when host memory holds so many bytes of them.

        >>> SavedInputs((4, 4, 4)).on_disk(8), SavedInputs((4, 4, 4)).on_disk(12)
        ((4,), ())
        """
        kept = 0
        for index in reversed(range(len(self.sizes))):
            kept += self.sizes[index]
            if kept > memory_nbytes:
                return self.sizes[: index + 1]
        return ()

    def disk_room_nbytes(self, memory_nbytes: int) -> int:
        """Return the room that they take on the drives; see `on_disk`."""
        return room_nbytes(self.on_disk(memory_nbytes))


def saved_inputs(model: ModelFacts, batch: int, length: int, itemsize: int) -> SavedInputs:
    """Return the inputs that a step keeps from forward to backward.

    Args:
        itemsize: bytes of an element in the compute dtype.
    """
    element_nbytes = batch * length * itemsize
    widths = model.input_widths.values()
    return SavedInputs(tuple(align_up(width * element_nbytes, _PAGE_NBYTES) for width in widths))
