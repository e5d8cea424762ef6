"""In which proportion the bytes of a new run are dealt to its drives: by their measured speeds, else alike.

It logs what it chose and why. A run keeps its stripes: a resume says what they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from ..machine import DriveSpeed, stripe_weights
from ..store import DriveLoad
from .measured import MeasuredDrives

__all__ = ["choose_weights", "log_stripes"]

_log = logging.getLogger("offload")


def choose_weights(measured: MeasuredDrives) -> tuple[tuple[float, ...] | None, str]:
    """Return the weights for `Store.create`, None for equal ones, and why.

    Args:
        measured: what is known of the run's directories. Of two on one drive each gets half its speed.
    """
    if measured.machine is None:
        return None, f"alike, since {measured.origin}"
    speeds = measured.speeds()
    missing = [directory for directory in measured.directories if directory not in speeds]
    if missing:
        return None, (
            f"alike, since {measured.origin} does not hold the drive of {missing[0]}; '{measured.command}'"
            " measures them"
        )
    sharing = Counter(measured.devices)
    drives = [speeds[directory] for directory in measured.directories]
    weights = stripe_weights([drive.rewrite_bytes_per_s / sharing[drive.device] for drive in drives])
    if len(set(weights)) == 1:
        return None, f"alike, since their speeds are, in {measured.origin}"
    return weights, f"by their speeds in {measured.origin}"


def log_stripes(loads: Sequence[DriveLoad], speeds: Mapping[str, DriveSpeed], reason: str) -> None:
    """Log each drive's share once, where there are several.

    Args:
        loads: of the run's drives, in order; their shares are what is logged.
        speeds: what was measured, by directory.
        reason: why they are what they are.
    """
    if len(loads) < 2:
        return
    words = []
    for load in loads:
        speed = speeds.get(load.directory)
        rate = "" if speed is None else f" {speed.rewrite_bytes_per_s / 1e9:.1f} GB/s"
        words.append(f"{load.directory}{rate} gets {load.share:.0%}")
    _log.info("stripes: %s; %s", ", ".join(words), reason)
