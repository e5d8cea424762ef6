"""Submits the requests of one ticket to the drives, in the order that transfers of the same bytes need.

Owns nothing. Thread rule: any thread; no lock is held while an earlier transfer is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from ..aio.engine import Engine, Op
from ..errors import OffloadError
from .drives import Drive
from .span import Transfer
from .ticket import IO_TIMEOUT_S, Part, Ticket

__all__ = ["submit", "submitting"]


@contextmanager
def submitting(ticket: Ticket, earlier: Sequence[Ticket]) -> Iterator[list[Part]]:
    """Let earlier transfers of the same bytes end, then collect the parts that the block submits.

    An error in the block (Ctrl-C, too) leaves when what it had submitted has ended, since the caller, who
    gets no ticket, takes the buffer to be its own again.
    """
    parts: list[Part] = []
    try:
        for other in earlier:
            other.settle()
        yield parts
    except BaseException as error:
        ticket.abandon(parts, error)
        for part in parts:
            with suppress(OffloadError):  # `error` is what is raised
                part.request.wait(IO_TIMEOUT_S)
        raise
    ticket.start(parts)


def submit(
    engine: Engine, drives: Sequence[Drive], op: Op, parts: list[Part], transfers: Iterable[Transfer]
) -> None:
    """Begin `transfers`, each in the file of its drive, adding each to `parts` when it is in flight."""
    for transfer in transfers:
        drive = drives[transfer.drive]
        # Before it is submitted: a small transfer may end before the call returns.
        begun_s = time.perf_counter()
        request = engine.submit(op, drive.file, transfer.view, transfer.offset_bytes)
        drive.meter.count(op, len(transfer.view))
        parts.append(
            Part(
                request,
                transfer.view,
                transfer.drive,
                drive.path,
                transfer.offset_bytes,
                drive.meter,
                begun_s,
                transfer.checks,
            )
        )
