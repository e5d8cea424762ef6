"""A stretch of a file that one thread reads and writes, and what must be in it: the model of the stress.

Requests of one region in flight never overlap, so what each must find or leave is known. Regions begin
and end at odd offsets: neighbours, which other threads work on at the same time, share a page.

Thread rule: a region belongs to its thread; only `observe` runs on others.
"""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offload.aio import Request
from offload.errors import RequestTimeoutError, StorageError

__all__ = ["Outcome", "Pending", "Region", "observe"]

# Bytes transferred and None, or those before the failure and its errno.
Outcome = tuple[int, int | None]


def observe(request: Request, rng: random.Random, *, cancel: bool = False) -> Outcome:
    """Wait for a request, impatiently at first, and return what came of it."""
    if cancel:
        request.cancel()
    for _ in range(rng.randrange(3)):
        try:
            request.wait(rng.choice([-1, 0, 1e-5, 1e-3]))
        except RequestTimeoutError:
            continue
        except StorageError:
            break  # the wait below must raise it again
    try:
        outcome: Outcome = (request.wait(), None)
    except RequestTimeoutError:
        raise AssertionError("a wait without a timeout timed out") from None
    except StorageError as error:
        outcome = (-1 if error.got_nbytes is None else error.got_nbytes, error.errno)
    assert request.done()
    assert request.finished_s is not None
    return outcome


@dataclass
class Pending:
    """A transfer whose end the region has not seen yet."""

    request: Request | None  # None: dropped; over when its file or engine has been closed
    start: int  # within the region
    nbytes: int
    written: bytes | None  # of a write; None is a read
    target: Any = None  # of a read, when it was kept
    may_cancel: bool = False
    by_own_handle: bool = True
    peers: list[Future[Outcome]] = field(default_factory=list)


class Region:
    """`nbytes` of the file `path` from `offset` on.

    Args:
        fd: a descriptor to look at the file with, past the engine.
    """

    def __init__(self, path: str, fd: int, offset: int, nbytes: int) -> None:
        self.path = path
        self.offset = offset
        self.nbytes = nbytes
        self.pending: list[Pending] = []
        self._fd = fd
        self._expected = bytearray(os.pread(fd, nbytes, offset))
        assert len(self._expected) == nbytes

    def is_free(self, start: int, nbytes: int) -> bool:
        """Whether no request in flight touches these bytes."""
        return all(one.start + one.nbytes <= start or start + nbytes <= one.start for one in self.pending)

    def settle(self, one: Pending, rng: random.Random) -> None:
        """Wait for one request and check what it did. A dropped one must be known to be over."""
        self.pending.remove(one)
        if one.request is None:
            self._settle_dropped(one)
            return
        got, error = outcome = observe(one.request, rng)
        for peer in one.peers:
            assert peer.result() == outcome, f"two threads saw {peer.result()} and {outcome}"
        if error is None:
            assert got == one.nbytes, f"{got} of {one.nbytes} bytes and no error"
        else:
            assert one.may_cancel, f"errno {error} of a request that nobody cancelled"
            assert error == errno.ECANCELED, f"errno {error} of a cancelled request"
            assert 0 <= got < one.nbytes
        if one.written is None:
            self._check_read(one, got)
        else:
            self._check_write(one, got)

    def check(self) -> None:
        """Compare the file with what must be in it. Nothing may be in flight."""
        assert not self.pending
        self._same(self._actual(0, self.nbytes), bytes(self._expected), 0)

    def _settle_dropped(self, one: Pending) -> None:
        if one.written is not None:
            self._check_write(one, 0 if one.may_cancel else one.nbytes)

    def _check_read(self, one: Pending, got: int) -> None:
        if one.target is not None:
            self._same(bytes(one.target[:got]), bytes(self._expected[one.start : one.start + got]), one.start)

    def _check_write(self, one: Pending, got: int) -> None:
        """The first `got` bytes are new; each of the others is old or new."""
        assert one.written is not None
        if one.nbytes == 0:
            return
        old = np.frombuffer(self._expected[one.start : one.start + one.nbytes], np.uint8)
        new = np.frombuffer(one.written, np.uint8)
        if got < one.nbytes:
            actual = np.frombuffer(self._actual(one.start, one.nbytes), np.uint8)
            wrong = (actual != new) & (actual != old)
            wrong[:got] = actual[:got] != new[:got]
            assert not wrong.any(), (
                f"{self.path}: byte {self.offset + one.start + int(wrong.argmax())} is neither old nor new"
            )
            new = actual
        self._expected[one.start : one.start + one.nbytes] = new.tobytes()

    def _actual(self, start: int, nbytes: int) -> bytes:
        return os.pread(self._fd, nbytes, self.offset + start)

    def _same(self, actual: bytes, expected: bytes, start: int) -> None:
        if actual == expected:
            return
        at = next(i for i, (a, e) in enumerate(zip(actual, expected, strict=False)) if a != e)
        raise AssertionError(
            f"{self.path}: byte {self.offset + start + at} is {actual[at]}, wanted {expected[at]}"
        )
