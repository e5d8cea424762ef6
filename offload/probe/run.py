"""`run_bench`: everything one `offload bench` measures, in order.

Thread rule: one thread calls it; it starts others and ends them before it returns or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .options import BenchOptions
from .results import BenchResult

__all__ = ["BenchOptions", "Progress", "run_bench"]

# Called with the fraction done, 0 to 1 and never less than before, and what is being done now.
Progress = Callable[[float, str], None]


def run_bench(
    directories: Sequence[str], options: BenchOptions, progress: Progress | None = None
) -> BenchResult:
    """Measure the drives that hold `directories`, then host memory and the GPU's link.

    In each directory one file is made and unlinked at once, so nothing is left behind however the
    process ends. With several directories each drive is measured alone, then all at once.

    Args:
        directories: one a drive, at least one; they must exist.
        options: what to measure.
        progress: told before each part what it is; called from the calling thread.

    Returns:
        All samples, and in `machine` the short form to keep.

    Raises:
        StorageError: a directory is missing, is none, or cannot be written to; or a transfer failed.
        DiskFullError: the file would not leave enough free; the message names a size that fits.
        CorruptionError: bytes read are not the bytes written.
        PlanError: the engine that was named cannot be had here.
        KeyboardInterrupt: as it came; nothing is left behind.
    """
    raise NotImplementedError
