"""The global norm of a step's gradients, from one squared norm per tensor.

Owns the squared norms of the step in progress. They are measured on the update thread as gradients
arrive, and awaited by the thread that ends the step.

Invariant: the sum is exact before its one rounding (`math.fsum`), so the norm depends neither on the
order in which gradients arrive, nor on where they were parked, nor on how the model is cut into units.

Thread rule: any method by any thread; `total` blocks.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

__all__ = ["GlobalNorm", "GradientNorms", "clip_factor"]


@dataclass(frozen=True, slots=True)
class GlobalNorm:
    """The 2-norm over all gradients of a step.

    Attributes:
        value: not finite when a gradient is not.
        not_finite: owners whose gradient has a NaN or an infinity.
    """

    value: float
    not_finite: tuple[str, ...]


class GradientNorms:
    """See the module."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._squared: dict[str, tuple[tuple[float, ...], bool]] = {}
        self._awaited = 0

    def expect(self) -> None:
        """Announce one `put` or `miss`; `total` waits for it."""
        with self._changed:
            self._awaited += 1

    def put(self, owner: str, squared: tuple[float, ...], *, is_finite: bool) -> None:
        """Note the squared norms of the tensors of a record's gradient so far; later ones replace them."""
        with self._changed:
            self._squared[owner] = (squared, is_finite)
            self._awaited -= 1
            self._changed.notify_all()

    def miss(self) -> None:
        """Note that an announced norm will not be measured, after a failure."""
        with self._changed:
            self._awaited -= 1
            self._changed.notify_all()

    def total(self) -> GlobalNorm:
        """Wait for what was announced and return the norm over all records."""
        with self._changed:
            self._changed.wait_for(lambda: not self._awaited)
            not_finite = tuple(owner for owner, (_, finite) in sorted(self._squared.items()) if not finite)
            if not_finite:
                return GlobalNorm(math.nan, not_finite)
            squares = (squared for tensors, _ in self._squared.values() for squared in tensors)
            return GlobalNorm(math.sqrt(math.fsum(squares)), ())

    def clear(self) -> None:
        """Forget the step's norms."""
        with self._changed:
            self._squared.clear()


def clip_factor(norm: float, max_norm: float) -> float:
    """Return what gradients of a norm are multiplied with, as `torch.nn.utils.clip_grad_norm_` does.

    >>> clip_factor(0.5, 1.0)
    1.0
    """
    return min(1.0, max_norm / (norm + 1e-6))
