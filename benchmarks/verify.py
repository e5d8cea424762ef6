"""Does `offload verify` read as fast as the drive?

A run of records as a model has them is verified, and the I/O engine reads as many bytes of the same data file
from one end to the other, in turn, the order swapped each round. Both read directly, past the page cache.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _cells import Cell, Spread, Transfer
from _ours import run_ours
from _quiet import quiet_disk
from _report import Report, add_report_arguments
from _turns import speed_ratio, take_turns

from offload.aio import open_engine
from offload.aio.memory import aligned_buffer
from offload.sizes import MIB, align_up, parse_bytes
from offload.store import RecordSpec, RunReader, Store, verify_reader

QUESTION = "does `offload verify` read as fast as the drive?"
BAR = 0.8

# A decoder layer of 3.5 million parameters in bf16 halves: weights, and residuals with fp32 moments.
WEIGHTS_NBYTES = 7 * MIB
OPTIMIZER_NBYTES = 35 * MIB
# How a run's engine is opened without a measurement.
CELL = Cell("read", MIB, 32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when a bar is missed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--disk", type=Path, metavar="DIR", help="measure the drive that holds DIR")
    parser.add_argument("--quiet", action="store_true", help="measure a disk in memory (root)")
    parser.add_argument("--size", default="1GiB", help="of the records [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.disk is None and not args.quiet:
        parser.error("name a drive to measure with --disk DIR, or --quiet, or both")
    nbytes = parse_bytes(args.size)
    report = Report(__file__, QUESTION, argv, args.disk)
    report.say(
        f"{args.size} of records, twice the space on disk, checked whole in each of {args.rounds} rounds; the"
        f" engine reads as much of the same file with requests of {CELL.block}, {CELL.depth} in flight."
        " Medians [least..most]; ratios are taken within each round."
    )
    report.say()
    if args.disk is not None:
        with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-verify-") as folder:
            _measure(report, "drive", Path(folder), nbytes, args.rounds)
    if args.quiet:
        with quiet_disk(2 * nbytes + 8 * (WEIGHTS_NBYTES + OPTIMIZER_NBYTES)) as directory:
            _measure(report, "quiet disk", directory, nbytes, args.rounds)
    return report.finish(args.save)


def _measure(report: Report, place: str, directory: Path, nbytes: int, rounds: int) -> None:
    run_id = _make_run(directory, nbytes)
    data = directory / f"run-{run_id}" / "data.bin"
    file_nbytes = data.stat().st_size
    to_read = min(nbytes, file_nbytes) // CELL.request_nbytes * CELL.request_nbytes

    def engine(cell: Cell) -> Transfer:
        return run_ours("uring", cell, [data], file_nbytes, to_read)

    def verify(cell: Cell) -> Transfer:
        with (
            open_engine("uring", queue_depth=cell.depth, segment_nbytes=cell.block_nbytes) as engine,
            RunReader.open([directory], engine=engine, run_id=run_id) as reader,
        ):
            before, began_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            found = verify_reader(reader)
            elapsed_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
        assert found.ok
        cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return Transfer(found.newest.nbytes, elapsed_s, cpu_s, cpu_s)

    measured = take_turns(report, place, CELL, {"engine": engine, "verify": verify}, rounds)
    rows = []
    for name, transfers in measured.items():
        rate = Spread.of(transfer.bytes_per_s / 1e9 for transfer in transfers)
        cost = Spread.of(transfer.cpu_s_per_gb for transfer in transfers)
        rows.append((name, rate, cost))
    report.say(f"## {place}")
    report.say()
    report.table(("", "GB/s", "CPU s / GB"), rows)
    ratio = speed_ratio(measured, "verify", "engine")
    report.say(f"verify / engine: {ratio}")
    report.bar(f"verify / engine, {place}", ratio.median, BAR, least=True)
    report.say()


def _make_run(directory: Path, nbytes: int) -> str:
    """Make a run with about `nbytes` of records, every byte of them written, and return its id."""
    specs = []
    total_nbytes = 0
    while total_nbytes < nbytes:
        for kind, wanted in (("weights", WEIGHTS_NBYTES), ("optimizer", OPTIMIZER_NBYTES)):
            # A toy has one layer, and a small one.
            part_nbytes = align_up(min(wanted, nbytes // 2), 4096)
            specs.append(RecordSpec(f"layer.{len(specs) // 2}:{kind}", part_nbytes))
            total_nbytes += part_nbytes
    buffer = aligned_buffer(max(spec.nbytes for spec in specs))
    for offset in range(0, len(buffer), 8):
        buffer[offset : offset + 8] = (offset * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little")
    with open_engine("uring") as engine, Store.create([directory], specs, engine=engine) as store:
        # Twice, since reading space that was reserved and never written costs a drive nothing.
        for step in (1, 2):
            for spec in specs:
                store.write(spec.name, buffer).wait()
            store.commit({"step": step})
        return store.run_id


if __name__ == "__main__":
    sys.exit(main())
