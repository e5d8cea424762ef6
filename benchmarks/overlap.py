"""Does a step take as long as its slowest part, or as long as all parts together?

Three measurements take turns, round after round, so that a machine that changes its pace changes it for
all of them:

  step     a step with everything on disk, up to its durable commit
  compute  the same step, same runtime and threads, with everything in memory (home: device)
  disk     the reads, writes and commit of such a step, replayed through a store without computing

The ratio step / max(compute, disk) is 1 when the smaller part hides behind the larger one completely.
The calls that are replayed were recorded from a step, in its order; a replay keeps as many bytes in
flight as the host budget holds.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _models import OpenModel, add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload import Runtime, Tracer
from offload.aio import open_engine
from offload.sizes import format_bytes, format_rate, parse_bytes
from offload.store import RecordSpec, Store

QUESTION = "does a step take as long as its slowest part?"
BAR = 1.2
PAIRS = (
    ("disk read", "compute"),
    ("disk write", "compute"),
    ("update", "compute"),
    ("disk read", "disk write"),
    ("disk read", "update"),
    ("disk write", "update"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when the bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    tracer = Tracer(enabled=args.trace is not None)
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-overlap-") as directory:
        on_disk, in_memory = _Trainer(args), _Trainer(args)
        with (
            on_disk.attach(disk=[directory], trace=tracer),
            in_memory.attach(
                home="device",
                host_memory=16 * in_memory.opened.num_parameters + (1 << 30),
                device_memory=8 * in_memory.opened.num_parameters + (2 << 30),
            ),
        ):
            on_disk.steps(2)
            calls = on_disk.record_step()
            with _Replay(Path(directory), calls, parse_bytes(args.host_memory)) as replay:
                rounds = [
                    _round(number, args, tracer, on_disk, in_memory, replay) for number in range(args.rounds)
                ]
    if args.trace is not None:
        tracer.write_chrome_trace(args.trace)
    for number, one in enumerate(rounds, start=1):
        report.sample(round=number, **{name: round(value, 4) for name, value in one.items()})
    _print(report, args, on_disk.opened, replay, rounds)
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "smollm2-135m")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="timed in each round, after one [%(default)s]")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step [%(default)s]")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row [%(default)s]")
    parser.add_argument("--micro-batch", type=int, metavar="ROWS", help="rows of a micro-batch [all]")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the steps")
    add_report_arguments(parser)
    return parser.parse_args(argv)


class _Trainer:
    """A model and the runtime it is attached to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.opened: OpenModel = open_model(args)
        self._tokens = random_tokens(self.opened, args.batch, args.length)
        self.runtime: Runtime

    def attach(self, **settings: Any) -> Runtime:
        settings = {
            "host_memory": self._args.host_memory,
            "device_memory": self._args.device_memory,
        } | settings
        self.runtime = offload.attach(
            self.opened.model,
            source=self.opened.source,
            device="cpu",
            rows=self._args.micro_batch,
            **settings,
        )
        return self.runtime

    def steps(self, count: int) -> float:
        """Run steps until the last is committed; return the seconds of one."""
        began_s = time.perf_counter()
        for _ in range(count):
            self.opened.model(input_ids=self._tokens, labels=self._tokens).loss.backward()
            self.runtime.step()
        self.runtime.synchronize()
        return (time.perf_counter() - began_s) / count

    def record_step(self) -> tuple[_Call, ...]:
        """Run a step and return what it asked of the store, reading ahead included."""
        with _recorded() as calls:
            _wait_for_rest(calls)
            calls.clear()
            self.steps(1)
            _wait_for_rest(calls)
        return tuple(calls)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `Store.read` or `Store.write`; `total_nbytes` is the length of the whole record."""

    is_write: bool
    record: str
    offset: int
    nbytes: int
    total_nbytes: int


@contextmanager
def _recorded() -> Iterator[list[_Call]]:
    """Collect the calls of every store while the context lasts."""
    calls: list[_Call] = []
    originals = {"read": Store.read, "write": Store.write}

    def recording(name: str) -> Any:
        def call(
            store: Store, record: str, buffer: Any, *, offset: int = 0, nbytes: int | None = None
        ) -> Any:
            total_nbytes = store.records[record].nbytes
            length = total_nbytes - offset if nbytes is None else nbytes
            calls.append(_Call(name == "write", record, offset, length, total_nbytes))
            return originals[name](store, record, buffer, offset=offset, nbytes=nbytes)

        return call

    try:
        for name in originals:
            setattr(Store, name, recording(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(Store, name, original)


def _wait_for_rest(calls: list[_Call]) -> None:
    """Wait until nothing has been asked for a while: the slots for reading ahead are full."""
    count = -1
    while count != len(calls):
        count = len(calls)
        time.sleep(0.3)


@dataclass
class _Replay:
    """A store of its own with the records of the run, and the calls of one step; a context manager."""

    directory: Path
    calls: Sequence[_Call]
    window_nbytes: int
    _free: dict[int, list[mmap.mmap]] = field(default_factory=dict)
    _steps: int = 0

    def __enter__(self) -> _Replay:
        sizes = {call.record: call.total_nbytes for call in self.calls}
        specs = [RecordSpec(name, nbytes) for name, nbytes in sizes.items()]
        self._engine = open_engine()
        self._store = Store.create([self.directory], specs, engine=self._engine)
        for name, nbytes in sizes.items():
            self._store.write(name, bytearray(nbytes)).wait()
        self._store.commit({"step": 0})
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
        self._engine.close()

    def steps(self, count: int) -> float:
        """Replay steps; return the seconds of one."""
        began_s = time.perf_counter()
        for _ in range(count):
            self._step()
        return (time.perf_counter() - began_s) / count

    def nbytes(self, *, written: bool) -> int:
        """Return the bytes one step reads or writes."""
        return sum(call.nbytes for call in self.calls if call.is_write == written)

    def _step(self) -> None:
        in_flight: deque[tuple[Any, mmap.mmap]] = deque()
        in_flight_nbytes = 0
        for call in self.calls:
            while in_flight and in_flight_nbytes + call.nbytes > self.window_nbytes:
                in_flight_nbytes -= self._finish(in_flight)
            begin = self._store.write if call.is_write else self._store.read
            free = self._free.setdefault(call.nbytes, [])
            buffer = free.pop() if free else mmap.mmap(-1, call.nbytes)
            ticket = begin(call.record, buffer, offset=call.offset, nbytes=call.nbytes)
            in_flight.append((ticket, buffer))
            in_flight_nbytes += call.nbytes
        while in_flight:
            self._finish(in_flight)
        self._steps += 1
        self._store.commit({"step": self._steps})

    def _finish(self, in_flight: deque[tuple[Any, mmap.mmap]]) -> int:
        ticket, buffer = in_flight.popleft()
        ticket.wait()
        self._free[len(buffer)].append(buffer)
        return len(buffer)


def _round(
    number: int,
    args: argparse.Namespace,
    tracer: Tracer,
    on_disk: _Trainer,
    in_memory: _Trainer,
    replay: _Replay,
) -> dict[str, float]:
    """Measure all three once; the first step of each is not timed."""
    on_disk.steps(1)
    tracer.reset()
    step_s = on_disk.steps(args.steps)
    busy_s = {f"{track} busy": seconds / args.steps for track, seconds in tracer.busy_s().items()}
    overlap_s = {f"{a} + {b}": tracer.overlap_s(a, b) / args.steps for a, b in PAIRS}
    in_memory.steps(1)
    compute_s = in_memory.steps(args.steps)
    replay.steps(1)
    disk_s = replay.steps(args.steps)
    ratio = step_s / max(compute_s, disk_s)
    print(
        f"round {number + 1}: step {step_s:.3f} s, compute {compute_s:.3f} s, disk {disk_s:.3f} s,"
        f" ratio {ratio:.3f}",
        flush=True,
    )
    return {"step": step_s, "compute": compute_s, "disk": disk_s, "ratio": ratio} | busy_s | overlap_s


def _print(
    report: Report,
    args: argparse.Namespace,
    opened: OpenModel,
    replay: _Replay,
    rounds: Sequence[dict[str, float]],
) -> None:
    read_nbytes, written_nbytes = replay.nbytes(written=False), replay.nbytes(written=True)
    disk_s = statistics.median(one["disk"] for one in rounds)
    rate = format_rate((read_nbytes + written_nbytes) / disk_s)
    report.say(
        f"{opened.label}, {opened.num_parameters:,} parameters, {args.batch} x {args.length} tokens a step;"
        f" host budget {args.host_memory}, device budget {args.device_memory}. A step reads"
        f" {format_bytes(read_nbytes)} and writes {format_bytes(written_nbytes)}, alone at {rate}."
        f" Direct I/O, no page cache. {len(rounds)} rounds of {args.steps} timed steps; seconds of a step:"
    )
    report.say()
    names = list(dict.fromkeys(name for one in rounds for name in one))
    columns = {name: [one.get(name, 0.0) for one in rounds] for name in names}
    report.table(
        ("", "median", "least", "most"),
        (
            (name, *(f"{figure(values):.3f}" for figure in (statistics.median, min, max)))
            for name, values in columns.items()
        ),
    )
    report.say("Busy: the track had work; A + B: both had at once. `step` is up to the durable commit.")
    report.say()
    report.bar("step / max(compute, disk)", statistics.median(columns["ratio"]), BAR, "(median)")


if __name__ == "__main__":
    sys.exit(main())
