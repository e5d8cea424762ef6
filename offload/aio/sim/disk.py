"""The simulated disk: files with a volatile cache, operations that are counted, faults, a power loss.

Invariants:
- Every open, allocation, segment and sync is one entry of `journal`, in the order they were begun, and
  may be hit by a fault there. The same seed, faults and calls give the same journal and bytes.
- A write in flight may have reached any of the sectors it overwrites, and all of them when it completes.
- Only `sync` makes bytes durable, and only those of completed writes for certain.
- After a `crash` fault the process is dead: whatever it asks for raises `SimCrash`.

Names: without a directory's descriptor they are in memory, and durable at once. Relative to one they
are in that real directory, where an empty file stands for each, so that code which lists, examines or
removes entries finds them; remove it, and the content is gone.

Thread rule: any thread may call any method; one lock covers the disk and the engines on it. It does
not submit or order anything: `offload.aio.sim.engine` does.
"""

from __future__ import annotations

import errno
import math
import os
import random
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from offload.aio.engine import Op, OpenMode
from offload.aio.failures import io_error
from offload.aio.portable_file import open_regular
from offload.aio.sim.content import SimContent
from offload.aio.sim.faults import Fault, FaultPlan, Operation, OperationKind, SimCrash, SimStuckError
from offload.aio.sim.schedule import Flight, Schedule

__all__ = ["SimDisk"]

_MAX_RETRIES = 64
_MODES = ("r", "r+", "x+")


class SimDisk:
    """A disk in memory; any number of `SimEngine` may use it.

    Args:
        seed: of every delay, order, short transfer and coin.
        capacity_nbytes: room for the sectors of all files.
        sector_nbytes: what is written whole, or torn at a crash.
        short_rate: the share of segments that move only a part of their bytes.
        faults: what goes wrong; see also `plan`.
        stuck_s: how long what is `stuck` hangs, in simulated seconds, if nobody calls `unstick`.
        on_operation: called with each operation's number before anything of it happens, the lock held.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        capacity_nbytes: int = 1 << 40,
        sector_nbytes: int = 512,
        short_rate: float = 1 / 8,
        faults: Iterable[Fault] = (),
        stuck_s: float = math.inf,
        on_operation: Callable[[int], None] | None = None,
    ) -> None:
        if sector_nbytes < 2 or capacity_nbytes < 0:
            raise ValueError(
                "sector_nbytes must be 2 or more and capacity_nbytes not negative, not "
                f"{sector_nbytes}, {capacity_nbytes}"
            )
        self.lock = threading.RLock()
        self.capacity_nbytes = capacity_nbytes
        self.sector_nbytes = sector_nbytes
        self.short_rate = short_rate
        self.journal: list[Operation] = []
        self.is_dead = False
        self._rng = random.Random(seed)
        self._plan = FaultPlan(faults)
        self._schedule = Schedule(self._rng, stuck_s)
        self._stuck_s = stuck_s
        self._on_operation = on_operation
        self._files: dict[str, SimContent] = {}

    # What a test does to it.

    def plan(self, *faults: Fault) -> None:
        """Plan more faults; operations are still counted from the first."""
        with self.lock:
            self._plan.add(*faults)

    def watch(self, on_operation: Callable[[int], None]) -> None:
        """Call `on_operation` from now on; see the class."""
        self._on_operation = on_operation

    def unstick(self) -> None:
        """Drop the `stuck` faults, and let complete what hangs by one."""
        with self.lock:
            self._plan.remove("stuck")
            self._schedule.release()

    def heal(self) -> None:
        """Drop every fault; what hangs completes, what went wrong before stays as it is."""
        with self.lock:
            self._plan.clear()
            self._schedule.release()

    def snapshot(self) -> SimDisk:
        """Return a disk in the same state, cache included, with nothing in flight and no faults."""
        with self.lock:
            copy = SimDisk(
                capacity_nbytes=self.capacity_nbytes,
                sector_nbytes=self.sector_nbytes,
                short_rate=self.short_rate,
            )
            copy._files = {path: content.copy() for path, content in self._files.items()}
            return copy

    def flip_bit(self, path: str, offset: int, bit: int = 0) -> None:
        """Turn over one bit of a file at rest."""
        with self.lock:
            self._files[os.path.abspath(path)].flip_bit(offset, bit)

    def crash(self, seed: int, *, moved: tuple[str, str] | None = None) -> SimDisk:
        """Return the disk that a power loss at this moment would leave; this one goes on unharmed.

        Args:
            seed: of what becomes of each sector that was not durable, and of the new disk.
            moved: (old, new) root of the files, where a test rebuilt the real directories elsewhere.
        """
        with self.lock:
            rng = random.Random(seed)
            left = SimDisk(
                seed=seed,
                capacity_nbytes=self.capacity_nbytes,
                sector_nbytes=self.sector_nbytes,
                short_rate=self.short_rate,
            )
            for path, content in self._files.items():
                left._files[_moved(path, moved)] = content.after_power_loss(rng)
            return left

    def restart(self) -> None:
        """Let the process be killed, if no fault has done so, and go on with the next one.

        The power stayed on: what was begun is finished, what was only queued is gone, and the cache
        keeps what was not synced. Engines and files of the killed process are not to be used again.
        """
        with self.lock:
            self._plan.remove("crash")
            self._plan.remove("stuck")
            for flight in self._schedule.abandon():
                self._transfer(flight)
            self.is_dead = False

    # Looking in from outside, as another process would.

    def exists(self, path: str) -> bool:
        """Return whether there is a file of that path."""
        return os.path.abspath(path) in self._files

    def paths(self) -> list[str]:
        """Return the paths of all files."""
        return list(self._files)

    def read_file(self, path: str) -> bytes:
        """Return a file's bytes as a reader sees them now, once nothing is in flight any more."""
        with self.lock:
            while not self.is_dead and self.step():
                pass
            content = self._files[os.path.abspath(path)]
            return content.read(0, content.size_nbytes)

    def write_file(self, path: str, data: bytes) -> None:
        """Give a file, new or not, durable bytes."""
        with self.lock:
            content = self._files.setdefault(os.path.abspath(path), SimContent(self.sector_nbytes))
            content.replace(data)

    def remove(self, path: str) -> None:
        """Remove a file if there is one."""
        with self.lock:
            self._files.pop(os.path.abspath(path), None)

    def used_nbytes(self, path: str) -> int:
        """Return the room that a file takes."""
        return self._files[os.path.abspath(path)].used_nbytes

    # What others ask of it.

    def enter(self, what: OperationKind, path: str, *, nbytes: int = 0) -> Fault | None:
        """Count an operation that takes place elsewhere, on a small file of the same drive.

        Returns:
            The fault that hits it, for the caller to bring about.
        """
        with self.lock:
            return self._next_fault(what, path, nbytes=nbytes)

    # What the engine asks of it.

    @property
    def now_s(self) -> float:
        """Simulated seconds since the disk was made."""
        return self._schedule.now_s

    def open(self, path: str, mode: OpenMode, dir_fd: int | None) -> SimContent:
        """Return the content of a file that is there, or of a new one."""
        if mode not in _MODES:
            raise ValueError(f"mode must be 'r', 'r+' or 'x+', not {mode!r}")
        if number := self._note("open", path):
            raise io_error("open", path, number)
        if dir_fd is None:
            key = os.path.abspath(path)
            there = key in self._files
        else:
            key = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
            os.close(open_regular(path, mode, dir_fd))
            there = mode != "x+" and key in self._files
        if there and mode == "x+":
            raise io_error("open", path, errno.EEXIST)
        if not there and mode != "x+":
            raise io_error("open", path, errno.ENOENT)
        if not there:
            self._files[key] = SimContent(self.sector_nbytes)
        return self._files[key]

    def allocate(self, content: SimContent, path: str, nbytes: int) -> None:
        """Reserve room for the first bytes of a file."""
        number = self._note("allocate", path, nbytes=nbytes)
        if not number and content.missing_for(nbytes) > self._free_nbytes():
            number = errno.ENOSPC
        if number:
            raise io_error("allocate", path, number, asked_nbytes=nbytes)
        content.reserve(nbytes)

    def begin(
        self,
        op: Op,
        content: SimContent,
        path: str,
        offset: int,
        memory: memoryview,
        on_end: Callable[[int], None],
    ) -> None:
        """Begin a segment; `on_end` is called with its result by the `step` that completes it."""
        fault = self._next_fault(op, path, offset, memory.nbytes)
        # Errors that are found before anything is moved leave the sectors alone.
        if op == "write" and (fault is None or fault.kind in ("EIO", "short", "stuck")):
            content.write_some(offset, memory, self._rng)
        self._schedule.start(Flight(op, content, path, offset, memory, fault, on_end))

    def step(self, until_s: float = math.inf) -> bool:
        """Let the next segment complete that is due by then; return whether there was one."""
        if self.is_dead:
            raise SimCrash("the process is dead and waits for the disk")
        flight = self._schedule.next(until_s)
        if flight is None:
            return False
        flight.on_end(self._transfer(flight))
        return True

    def coin(self) -> bool:
        """Return true or false, as the seed says."""
        return self._rng.random() < 0.5

    def sync(self, content: SimContent, path: str) -> None:
        """Make completed writes durable; other segments go on meanwhile."""
        fault = self._next_fault("sync", path, during=lambda: content.flush_some(self._rng))
        until_s = self.now_s + self._schedule.delay_s()
        if fault is not None and fault.kind == "stuck":
            self._check_not_for_ever("sync", path)
            until_s, fault = self.now_s + self._stuck_s, None
        while self.step(until_s):
            pass
        # Not retried, whatever the errno: after a failed flush a second one proves nothing.
        if fault is not None:
            content.fail_flush(self._rng)
            raise io_error("sync", path, fault.errno)
        content.flush()

    def _note(self, what: OperationKind, path: str, *, nbytes: int = 0) -> int:
        """Note an operation, and again as often as it is interrupted; return its errno, 0 for none."""
        for _ in range(_MAX_RETRIES + 1):
            fault = self._next_fault(what, path, nbytes=nbytes)
            if fault is None or fault.kind != "EINTR":
                break
        if fault is None:
            return 0
        if fault.kind == "stuck":
            self._check_not_for_ever(what, path)
        return fault.errno

    def _next_fault(
        self,
        what: OperationKind,
        path: str,
        offset: int = 0,
        nbytes: int = 0,
        during: Callable[[], None] = lambda: None,
    ) -> Fault | None:
        """Enter an operation in the journal; die, after `during`, if the fault that hits it says so."""
        if self.is_dead:
            raise SimCrash(f"the process is dead and asks for {what} of {path}")
        if self._on_operation is not None:
            self._on_operation(len(self.journal))
        fault = self._plan.next(what)
        self.journal.append(Operation(what, path, offset, nbytes, None if fault is None else fault.kind))
        if fault is not None and fault.kind == "crash":
            during()
            self.is_dead = True
            raise SimCrash(f"at operation {len(self.journal) - 1}, {what} of {path}")
        return fault

    def _check_not_for_ever(self, what: str, path: str) -> None:
        if math.isinf(self._stuck_s):
            raise SimStuckError(f"{what} of {path} hangs for ever; a real one would block here")

    def _transfer(self, flight: Flight) -> int:
        """Move the bytes of a segment that completes; return how many, or the negative errno."""
        fault, memory, nbytes = flight.fault, flight.memory, flight.memory.nbytes
        if fault is not None and fault.errno:
            return -fault.errno
        asked_short = fault is not None and fault.kind == "short"
        if nbytes > 1 and (asked_short or self._rng.random() < self.short_rate):
            nbytes = self._rng.randrange(1, nbytes)
        flipped = fault is not None and fault.kind == "flip"
        if flight.op == "read":
            data = flight.content.read(flight.offset, nbytes)
            memory[: len(data)] = self._flipped(data) if flipped else data
            return len(data)
        nbytes = flight.content.room_for(flight.offset, nbytes, self._free_nbytes())
        if nbytes == 0:
            return -errno.ENOSPC
        written = memory[:nbytes]
        flight.content.write(flight.offset, self._flipped(bytes(written)) if flipped else written)
        return nbytes

    def _flipped(self, data: bytes) -> bytes:
        changed = bytearray(data)
        if changed:
            changed[self._rng.randrange(len(changed))] ^= 1 << self._rng.randrange(8)
        return bytes(changed)

    def _free_nbytes(self) -> int:
        return self.capacity_nbytes - sum(content.used_nbytes for content in self._files.values())


def _moved(path: str, moved: tuple[str, str] | None) -> str:
    return path if moved is None else str(Path(moved[1]) / Path(path).relative_to(moved[0]))
