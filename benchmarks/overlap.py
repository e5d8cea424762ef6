"""Does a step take as long as its slowest part, or as long as all parts together?

Three measurements take turns, round after round, so that a machine that changes its pace changes it for
all of them:

  step     a step with everything on disk, its durable commit included
  compute  the same step, same runtime and threads, with everything in memory (home: device)
  disk     the reads, writes and commit of such a step, replayed through a store without computing

The ratio step / max(compute, disk) is 1 when the smaller part hides behind the larger one completely.
Steps are timed in the steady state, from the end of one to the end of another with no pause between: what
a step leaves to the next one's forward (a commit; with --max-grad-norm all updates) is paid for there. The
calls that are replayed were recorded from such a step, in its order; a replay keeps as many bytes in flight
as the host budget holds.

  python benchmarks/overlap.py --disk /mnt/nvme --max-grad-norm 1
  python benchmarks/overlap.py --quiet --batch 4        a disk in memory, which repeats (root)

Gradients that clipping keeps go to disk when --host-memory does not hold them.

On a machine without a GPU, compute and the runtime's own work (checksums, AdamW, copies) share the cores,
and what they need together is a bound as well: --threads below the number of cores keeps them apart. The
embedding is updated last and needed first, so a step waits for its update: `100m` with its 19 % of
parameters there shows that, `100m-deep` has 3 % (65B models: 0.4 %).
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _models import OpenModel, add_model_arguments, open_model, random_tokens
from _quiet import quiet_disk
from _report import Report, add_report_arguments

import offload
from offload import Runtime, Tracer
from offload.aio import open_engine
from offload.sizes import format_bytes, format_rate, parse_bytes
from offload.store import RecordSpec, Store
from offload.store.scratch import Scratch

QUESTION = "does a step take as long as its slowest part?"
BAR = 1.1
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
    torch.set_num_threads(args.threads)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    on_disk, in_memory = _Trainer(args), _Trainer(args)
    with ExitStack() as stack:
        folder = args.disk
        if args.quiet:
            folder = stack.enter_context(quiet_disk(_room_nbytes(on_disk.opened)))
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix="offload-overlap-"))
        _measure(args, report, on_disk, in_memory, Path(directory))
    return report.finish(args.save)


def _room_nbytes(opened: OpenModel) -> int:
    """Return what the run and its replay need, each its state twice and its gradients once."""
    return 2 * (2 * 12 + 4) * opened.num_parameters + (256 << 20)


def _measure(
    args: argparse.Namespace, report: Report, on_disk: _Trainer, in_memory: _Trainer, directory: Path
) -> None:
    tracer = Tracer(enabled=args.trace is not None)
    with (
        on_disk.attach(disk=[directory], trace=tracer) as runtime,
        in_memory.attach(
            home="device",
            host_memory=20 * in_memory.opened.num_parameters + (1 << 30),
            device_memory=8 * in_memory.opened.num_parameters + (2 << 30),
        ),
    ):
        on_disk.steps(2)
        calls = on_disk.record_step()
        with _Replay(directory, calls, parse_bytes(args.host_memory)) as replay:
            rounds = [
                _round(number, args, tracer, on_disk, in_memory, replay) for number in range(args.rounds)
            ]
        parked = runtime.plan.describe_parked()
    if args.trace is not None:
        tracer.write_chrome_trace(args.trace)
    for number, one in enumerate(rounds, start=1):
        report.sample(round=number, **{name: round(value, 4) for name, value in one.items()})
    _print(report, args, on_disk.opened, replay, rounds, parked)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "smollm2-135m")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="where the state may lie")
    parser.add_argument("--quiet", action="store_true", help="a disk in memory instead (root)")
    parser.add_argument("--max-grad-norm", type=float, metavar="X", help="clip by the global norm [do not]")
    parser.add_argument("--moments", choices=("float32", "8bit"), default="float32", help="[%(default)s]")
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="timed in each round, after one [%(default)s]")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step [%(default)s]")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row [%(default)s]")
    parser.add_argument("--micro-batch", type=int, metavar="ROWS", help="rows of a micro-batch [all]")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="of compute; fewer than cores leave one to the runtime, as beside a GPU [%(default)s]",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace of the steps")
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if (args.disk is None) != args.quiet:
        parser.error("name a drive to measure with --disk DIR, or --quiet")
    return args


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
            max_grad_norm=self._args.max_grad_norm,
            moments=self._args.moments,
            **settings,
        )
        return self.runtime

    def steps(self, count: int) -> float:
        """Run steps with no pause before or between them; return the seconds of one."""
        began_s = time.perf_counter()
        for _ in range(count):
            self.opened.model(input_ids=self._tokens, labels=self._tokens).loss.backward()
            self.runtime.step()
        return (time.perf_counter() - began_s) / count

    def rest(self) -> None:
        """Wait until everything is committed."""
        self.runtime.synchronize()

    def record_step(self) -> tuple[_Call, ...]:
        """Run a step and return what it asked of the drives, reading ahead included."""
        with _recorded() as calls:
            self.rest()
            _wait_for_rest(calls)
            calls.clear()
            self.steps(1)
            self.rest()
            _wait_for_rest(calls)
        return tuple(calls)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `read` or `write` of a store or a scratch area.

    Attributes:
        area: whose.
        is_write: which.
        record: its name.
        offset: of what is transferred.
        nbytes: of what is transferred.
        total_nbytes: length of the whole record.
        chunk_nbytes: length of a chunk there.
    """

    area: str
    is_write: bool
    record: str
    offset: int
    nbytes: int
    total_nbytes: int
    chunk_nbytes: int


@contextmanager
def _recorded() -> Iterator[list[_Call]]:
    """Collect the calls of every store and scratch area while the context lasts."""
    calls: list[_Call] = []
    kinds: dict[str, type] = {"store": Store, "scratch": Scratch}
    originals = {(area, name): getattr(kinds[area], name) for area in kinds for name in ("read", "write")}

    def recording(area: str, name: str) -> Any:
        def call(drives: Any, record: str, buffer: Any, *, offset: int = 0, nbytes: int | None = None) -> Any:
            total_nbytes = drives.records[record].nbytes
            length = total_nbytes - offset if nbytes is None else nbytes
            chunk_nbytes = drives.chunk_nbytes
            calls.append(_Call(area, name == "write", record, offset, length, total_nbytes, chunk_nbytes))
            return originals[area, name](drives, record, buffer, offset=offset, nbytes=nbytes)

        return call

    try:
        for area, name in originals:
            setattr(kinds[area], name, recording(area, name))
        yield calls
    finally:
        for (area, name), original in originals.items():
            setattr(kinds[area], name, original)


def _wait_for_rest(calls: list[_Call]) -> None:
    """Wait until nothing has been asked for a while: the slots for reading ahead are full."""
    count = -1
    while count != len(calls):
        count = len(calls)
        time.sleep(0.3)


@dataclass
class _Replay:
    """A store and scratch area with the records of a run, and the calls of a step; a context manager."""

    directory: Path
    calls: Sequence[_Call]
    window_nbytes: int
    _free: dict[int, list[mmap.mmap]] = field(default_factory=dict)
    _steps: int = 0

    def __enter__(self) -> _Replay:
        self._engine = open_engine()
        self._store = Store.create(
            [self.directory],
            self._specs("store"),
            engine=self._engine,
            chunk_nbytes=next(call.chunk_nbytes for call in self.calls if call.area == "store"),
        )
        self._areas: dict[str, Any] = {"store": self._store}
        if scratch := self._specs("scratch"):
            chunk_nbytes = next(call.chunk_nbytes for call in self.calls if call.area == "scratch")
            self._areas["scratch"] = self._store.scratch(scratch, chunk_nbytes=chunk_nbytes)
        for area in self._areas.values():
            for name, spec in area.records.items():
                area.write(name, bytearray(spec.nbytes)).wait()
        self._store.commit({"step": 0})
        return self

    def __exit__(self, *_: object) -> None:
        for area in reversed(self._areas.values()):
            area.close()
        self._engine.close()

    def _specs(self, area: str) -> list[RecordSpec]:
        sizes = {call.record: call.total_nbytes for call in self.calls if call.area == area}
        return [RecordSpec(name, nbytes) for name, nbytes in sizes.items()]

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
            area = self._areas[call.area]
            begin = area.write if call.is_write else area.read
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
    on_disk.rest()
    busy_s = {f"{track} busy": seconds / args.steps for track, seconds in tracer.busy_s().items()}
    overlap_s = {f"{a} + {b}": tracer.overlap_s(a, b) / args.steps for a, b in PAIRS}
    in_memory.steps(1)
    compute_s = in_memory.steps(args.steps)
    in_memory.rest()
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
    parked: str,
) -> None:
    read_nbytes, written_nbytes = replay.nbytes(written=False), replay.nbytes(written=True)
    disk_s = statistics.median(one["disk"] for one in rounds)
    rate = format_rate((read_nbytes + written_nbytes) / disk_s)
    clipping = "none" if args.max_grad_norm is None else f"by {args.max_grad_norm:g}, {parked}"
    moved = f"reads {format_bytes(read_nbytes)} and writes {format_bytes(written_nbytes)}, alone at {rate}"
    drive = "A loop device over memory" if args.quiet else "Direct I/O, no page cache"
    report.say(
        f"{opened.label}, {opened.num_parameters:,} parameters, {args.batch} x {args.length} tokens a step,"
        f" {args.moments} moments; host budget {args.host_memory}, device budget {args.device_memory}."
        f" A step {moved}. Clipping: {clipping}. {drive}."
        f" {len(rounds)} rounds of {args.steps} timed steps; seconds of a step:"
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
    report.say("Busy: the track had work; A + B: both had at once. Commits are part of `step` and `disk`.")
    report.say()
    report.bar("step / max(compute, disk)", statistics.median(columns["ratio"]), BAR, "(median)")


if __name__ == "__main__":
    sys.exit(main())
