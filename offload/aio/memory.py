"""Memory whose address suits direct transfers. Nothing else."""

from __future__ import annotations

import contextlib
import mmap

from offload.sizes import MIB

__all__ = ["aligned_buffer", "map_pages"]

# Below one huge page the advice to use them says nothing.
_HUGE_PAGE_NBYTES = 2 * MIB


def aligned_buffer(nbytes: int) -> memoryview:
    """Return `nbytes` of zeroed, page-aligned memory; it goes when the last view of it does.

    Transfers between such a buffer and an aligned file offset bypass the page cache. Ordinary arrays and
    bytearrays work as well, through the cache wherever their address is not aligned.

    Its pages appear when they are first touched, which is slower than the drives of today: keep a
    buffer and use it again.

    >>> buffer = aligned_buffer(8192)
    >>> buffer[:4] = b"data"
    >>> buffer.nbytes
    8192
    """
    return memoryview(map_pages(max(nbytes, 1)))[:nbytes]  # an empty mapping is not allowed


def map_pages(nbytes: int) -> mmap.mmap:
    """Return an anonymous mapping of at least one byte, in huge pages where the kernel has them."""
    # MAP_PRIVATE: Python's default, MAP_SHARED, would make it shmem, which swaps and counts differently.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_PAGE_NBYTES:
        # EINVAL: a kernel built without transparent huge pages. Only first touch is slower.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
