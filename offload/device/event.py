"""The point in a device's work that others wait for. A Protocol; each device has its own kind."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Event"]


class Event(Protocol):
    """Passes when the work recorded before it has ended, and stays passed."""

    def wait(self) -> None:
        """Block the calling host thread until the event has passed."""

    def done(self) -> bool:
        """Return whether it has passed, without blocking."""
