"""Everything at once on one engine, and the files compared with a model: a program, for the sanitizers.

    python tests/sanitize/engine_stress.py --engine uring --seed 7 --operations 20000 DIR [DIR ...]

Threads read and write at random offsets and sizes in files they share; they drop requests, files and
buffers, cancel, wait with short timeouts and from several threads, read past the end, write past the
size limit, sync, and close files and engines with work in flight. Work goes in rounds, each with an
engine of its own. What each thread does follows from the seed; how their doings interleave does not.

Exits with 0 and one line of counts, or with 1 and the way to repeat the run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import faulthandler
import gc
import mmap
import os
import random
import resource
import shlex
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from stress_region import Pending, Region, observe

from offload.aio import Engine, File, open_engine
from offload.errors import DiskFullError, StateError, StorageError

NUM_WORKERS = 4
NUM_FILES = 3
REGION_NBYTES = 200_003  # odd, so that neighbours share a page
FILE_NBYTES = NUM_WORKERS * REGION_NBYTES
LIMIT_NBYTES = 1 << 20  # no file may grow beyond (RLIMIT_FSIZE); a multiple of the block size
ROUND_OPERATIONS = 400
ENGINE_CLOSED = "I/O engine is closed"
MAX_PENDING = 12
SHIFTS = (0, 0, 0, 1, 64, 512, 4095)  # of a buffer from a page boundary
FULL_DRIVE_FILES = 80  # of LIMIT_NBYTES each: more than the small drive holds

assert FILE_NBYTES < LIMIT_NBYTES


class Round:
    """One engine, its shared handles, and the threads that look at requests of others."""

    def __init__(self, name: str, paths: list[str], rng: random.Random, peers: ThreadPoolExecutor) -> None:
        self.engine: Engine | None = open_engine(
            name,  # type: ignore[arg-type]
            queue_depth=rng.randint(1, 8),
            segment_nbytes=rng.choice([4096, 16384, 65536]),
            direct=rng.random() < 0.7,
        )
        self.paths = paths
        self.peers = peers
        self.shared: list[File] = [self.engine.open(path, "r+") for path in paths]
        self.may_end = threading.Event()
        self.ending = rng.choice(["close", "close", "two closers", "drop"])
        if name == "portable" and self.ending == "drop":
            self.ending = "close"  # its loop refers to it until it is closed

    def end(self) -> None:
        """Close the engine, or let it go, with whatever is in flight."""
        if self.ending == "drop":
            self.engine = None
            gc.collect()
        elif self.engine is not None:
            other = self.peers.submit(self.engine.close) if self.ending == "two closers" else None
            self.engine.close()
            if other is not None:
                other.result()


class Worker:
    """One thread's regions and doings; lives for all rounds."""

    def __init__(
        self, number: int, folders: list[Path], fds: dict[str, int], small_drive: Path | None
    ) -> None:
        self.number = number
        self.counts: collections.Counter[str] = collections.Counter()
        self.failure: str | None = None
        offset = number * REGION_NBYTES
        self._regions = [Region(path, fd, offset, REGION_NBYTES) for path, fd in fds.items()]
        self._limited = str(folders[number % len(folders)] / f"limited{number}")
        self._small_drive = small_drive if number == 0 else None

    def work(self, this: Round, seed: str) -> None:
        """Do this thread's part of a round; what goes wrong is kept in `failure`."""
        try:
            self._work(this, random.Random(seed))
        except BaseException:  # noqa: BLE001 - shown by the main thread
            self.failure = traceback.format_exc()
        if self.number == 0 or self.failure is not None:
            this.may_end.set()

    def settle_all(self, seed: str) -> None:
        """After the engine's end: every request is done; check each, then the files."""
        rng = random.Random(seed)
        for region in self._regions:
            while region.pending:
                one = rng.choice(region.pending)
                assert one.request is None or one.request.done(), "closing the engine left a request behind"
                region.settle(one, rng)
            region.check()

    def _work(self, this: Round, rng: random.Random) -> None:
        engine = this.engine
        assert engine is not None
        try:
            own = [engine.open(region.path, "r+") for region in self._regions]
        except StateError:
            return  # the engine was closed before this thread began
        doings: list[tuple[int, Callable[[], None]]] = [
            (60, lambda: self._transfer(this, engine, own, rng)),
            (25, lambda: self._settle_some(rng)),
            (3, lambda: self._reopen(engine, own, rng)),
            (2, lambda: self._reopen_shared(this, engine, rng)),
            (3, lambda: self._read_past_the_end(engine, own, rng)),
            (2, lambda: self._write_past_the_limit(engine, rng)),
            (2, lambda: self._look(engine, own, rng)),
            (1, lambda: self._misuse(engine, own, rng)),
        ]
        weights = [weight for weight, _ in doings]
        if self._small_drive is not None and (not self.counts["drives filled"] or rng.random() < 0.1):
            self._fill_the_drive(engine, self._small_drive)
        end_at = rng.randrange(ROUND_OPERATIONS)
        for step in range(ROUND_OPERATIONS):
            if self.number == 0 and step == end_at and this.ending != "drop":
                this.may_end.set()  # the others may be in the middle of anything
            try:
                rng.choices(doings, weights)[0][1]()
            except StateError as error:
                if ENGINE_CLOSED not in str(error):
                    raise
                self.counts["stopped"] += 1
                return  # the engine was closed under this thread

    def _transfer(self, this: Round, engine: Engine, own: list[File], rng: random.Random) -> None:
        index = rng.randrange(NUM_FILES)
        region = self._regions[index]
        if len(region.pending) >= MAX_PENDING:
            self._settle_one(region, rng)
            return
        start, nbytes = _extent(rng)
        if not region.is_free(start, nbytes):
            return
        fate: Literal["keep", "drop"] = "drop" if rng.random() < 0.15 else "keep"
        by_own_handle = fate == "drop" or rng.random() < 0.7
        file = own[index] if by_own_handle else this.shared[index]
        may_cancel = rng.random() < 0.2
        written = rng.randbytes(nbytes) if rng.random() < 0.6 else None
        buffer = _buffer(nbytes, rng)
        if written is not None:
            buffer[:nbytes] = written
        op: Literal["read", "write"] = "read" if written is None else "write"
        try:
            request = engine.submit(op, file, buffer, region.offset + start, nbytes)
        except StateError as error:
            if by_own_handle or ENGINE_CLOSED in str(error):
                raise
            self.counts["refused by a closed file"] += 1
            return
        one = Pending(request, start, nbytes, written, None, may_cancel, by_own_handle)
        if may_cancel and rng.random() < 0.5:
            self.counts["cancelled at once"] += request.cancel()
        if fate == "drop":
            one.request = None
        else:
            if written is None and rng.random() < 0.9:
                one.target = buffer
            for _ in range(rng.choice([0, 0, 0, 1, 2])):
                look = random.Random(rng.random())
                cancel = may_cancel and look.random() < 0.5
                one.peers.append(this.peers.submit(observe, request, look, cancel=cancel))
        region.pending.append(one)
        self.counts[f"{op}s"] += 1
        self.counts["dropped"] += fate == "drop"

    def _settle_some(self, rng: random.Random) -> None:
        for region in self._regions:
            if region.pending and rng.random() < 0.5:
                self._settle_one(region, rng)

    def _settle_one(self, region: Region, rng: random.Random) -> None:
        known = [one for one in region.pending if one.request is not None]
        if known:
            region.settle(rng.choice(known), rng)
            self.counts["waits"] += 1

    def _reopen(self, engine: Engine, own: list[File], rng: random.Random) -> None:
        """Close a file of this thread's, or only let it go, with requests in flight."""
        index = rng.randrange(NUM_FILES)
        region = self._regions[index]
        replacement = engine.open(region.path, "r+")
        if rng.random() < 0.3 and not any(one.request is None for one in region.pending):
            own[index] = replacement  # the requests in flight keep the old one open
            for one in region.pending:
                one.by_own_handle = False
            self.counts["files dropped"] += 1
            return
        own[index].close()
        own[index] = replacement
        for one in [one for one in region.pending if one.by_own_handle]:
            assert one.request is None or one.request.done(), "closing the file left a request behind"
            region.settle(one, rng)
        self.counts["files closed"] += 1

    def _reopen_shared(self, this: Round, engine: Engine, rng: random.Random) -> None:
        """Close a file that other threads may be submitting to."""
        index = rng.randrange(NUM_FILES)
        old, this.shared[index] = this.shared[index], engine.open(self._regions[index].path, "r+")
        old.close()
        self.counts["shared files closed"] += 1

    def _read_past_the_end(self, engine: Engine, own: list[File], rng: random.Random) -> None:
        index = rng.randrange(NUM_FILES)
        offset = FILE_NBYTES - rng.choice([0, 1, 4095, 70_001])
        request = engine.submit("read", own[index], _buffer(90_000, rng), offset, 90_000)
        outcome = observe(request, rng)
        assert outcome == (FILE_NBYTES - offset, 0), f"{outcome} for a read past the end at {offset}"
        self.counts["short reads"] += 1

    def _write_past_the_limit(self, engine: Engine, rng: random.Random) -> None:
        Path(self._limited).unlink(missing_ok=True)
        with engine.open(self._limited, "x+") as file:
            before = rng.choice([0, 4096, 5000, 150_000])
            request = engine.submit("write", file, _buffer(160_000, rng), LIMIT_NBYTES - before, 160_000)
            outcome = observe(request, rng)
        assert outcome == (before, errno.EFBIG), f"{outcome} for a write {before} bytes before the limit"
        self.counts["writes past the limit"] += 1

    def _look(self, engine: Engine, own: list[File], rng: random.Random) -> None:
        index = rng.randrange(NUM_FILES)
        assert own[index].size_nbytes == FILE_NBYTES
        own[index].allocate(rng.randrange(FILE_NBYTES))
        engine.sync(own[index])
        self.counts["syncs"] += 1

    def _misuse(self, engine: Engine, own: list[File], rng: random.Random) -> None:
        """A call that is refused must let its buffer go."""
        buffer = bytearray(100)
        try:
            engine.submit("write", own[rng.randrange(NUM_FILES)], buffer, -1)
        except ValueError:
            buffer.append(1)
        else:
            raise AssertionError("a negative offset was accepted")
        self.counts["refused"] += 1

    def _fill_the_drive(self, engine: Engine, folder: Path) -> None:
        """Write files up to the size limit until there is no room."""
        paths = [folder / f"full{number}" for number in range(FULL_DRIVE_FILES)]
        buffer = _mapping(LIMIT_NBYTES)
        try:
            for number, path in enumerate(paths):
                with engine.open(str(path), "x+") as file:
                    if number % 8:
                        file.allocate(LIMIT_NBYTES)
                    else:
                        engine.submit("write", file, buffer, 0).wait()
        except DiskFullError:
            self.counts["drives filled"] += 1
        else:
            raise AssertionError(f"{folder} took {FULL_DRIVE_FILES} MiB; it should hold less")
        finally:
            for path in paths:
                path.unlink(missing_ok=True)


def _extent(rng: random.Random) -> tuple[int, int]:
    kind = rng.random()
    if kind < 0.3:  # whole pages of the file, the direct path when the buffer is aligned too
        nbytes = 4096 * rng.randint(1, 16)
        start = rng.randrange(REGION_NBYTES - nbytes)
        return max(start - start % 4096, 0), nbytes
    nbytes = rng.randint(0, 600) if kind < 0.5 else rng.randint(1, 40_000)
    return rng.randrange(REGION_NBYTES - nbytes), nbytes


def _buffer(nbytes: int, rng: random.Random) -> Any:
    """`nbytes` of memory: Python's own, or a mapping, aligned or shifted."""
    return bytearray(nbytes) if rng.random() < 0.4 else _mapping(nbytes, rng.choice(SHIFTS))


def _mapping(nbytes: int, shift: int = 0) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes + shift + 1))[shift : shift + nbytes]


def run(
    name: str, seed: int, num_operations: int, folders: list[Path], small_drive: Path | None
) -> collections.Counter[str]:
    """Run rounds until so many requests were submitted; return what was done how often."""
    paths = [str(folders[number % len(folders)] / f"shared{number}") for number in range(NUM_FILES)]
    fds = {}
    for number, path in enumerate(paths):
        Path(path).write_bytes(random.Random(number).randbytes(FILE_NBYTES))
        fds[path] = os.open(path, os.O_RDONLY)
    workers = [Worker(number, folders, fds, small_drive) for number in range(NUM_WORKERS)]
    total: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(3, thread_name_prefix="peer") as peers:
        while total["reads"] + total["writes"] < num_operations:
            number = total["rounds"]
            this = Round(name, paths, random.Random(f"{seed} {number}"), peers)
            threads = [
                threading.Thread(target=worker.work, args=(this, f"{seed} {number} {worker.number}"))
                for worker in workers
            ]
            for thread in threads:
                thread.start()
            if this.ending != "drop":
                this.may_end.wait()
                this.end()
            for thread in threads:
                thread.join()
            for worker in workers:
                if worker.failure is not None:
                    raise AssertionError(f"thread {worker.number}, round {number}:\n{worker.failure}")
            if this.ending == "drop":
                this.end()
            for worker in workers:
                worker.settle_all(f"{seed} {number} {worker.number} end")
            total = sum((worker.counts for worker in workers), collections.Counter())
            total["rounds"] = number + 1
    for fd in fds.values():
        os.close(fd)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="file systems to work on")
    parser.add_argument("--engine", default="uring", choices=["uring", "threads", "portable"])
    parser.add_argument("--operations", type=int, default=10_000, help="requests to submit")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--small-drive", type=Path, metavar="DIR", help="less than 80 MiB, to be filled")
    parser.add_argument("--timeout-s", type=float, default=600, help="then the program ends with all stacks")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.timeout_s, exit=True)
    # Python ignores SIGXFSZ, so a write beyond the limit fails with EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_NBYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with contextlib.ExitStack() as stack:
        folders = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(dir=one))) for one in arguments.folders
        ]
        try:
            counts = run(
                arguments.engine, arguments.seed, arguments.operations, folders, arguments.small_drive
            )
        except (AssertionError, StorageError, StateError):
            traceback.print_exc()
            print(
                f"repeat with: {shlex.join(['python', *sys.argv])} --seed {arguments.seed}", file=sys.stderr
            )
            return 1
    print(
        f"{arguments.engine}, seed {arguments.seed}:", ", ".join(f"{n} {what}" for what, n in counts.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
