"""How many bytes does an optimizer step read and write for each parameter?

Everything lies on disk: bf16 weights whose fp32 masters are exact, and moments in fp32 or in 8 bits. The
kernel's own counters (/proc/self/io: bytes this process made the block layer fetch and store) are read
around steady steps, for the batch at once and cut into four micro-batches. Between steps the benchmark
waits until the counters rest, so that what is read ahead counts for the step that caused it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload import Runtime

QUESTION = "how many bytes does a step read and write for each parameter?"
# bf16 weights twice (2 + 2), residual (2) and moments (8, or 2.03 in 8 bits) read; one of the two
# weight reads is not written. 0.3 for scales, padding, manifests and the journal.
BARS = {"float32": (14.3, 12.3), "8bit": (8.3, 6.3)}
MICRO_BATCHES = 4
COUNTERS = ("kernel read", "kernel written", "runtime read", "runtime written")
# How long the counters must rest before they are read.
REST_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    figures = [_measure(args, report, rows) for rows in (None, args.batch // MICRO_BATCHES)]
    for micro_batches, read, written in figures:
        what = f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}"
        read_bar, write_bar = BARS[args.moments]
        report.bar(f"read, {what}", read, read_bar, "bytes per parameter")
        report.bar(f"written, {what}", written, write_bar, "bytes per parameter")
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "100m")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--moments", choices=sorted(BARS), default="float32", help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, metavar="STEPS", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--batch", type=int, default=MICRO_BATCHES, help="rows of a step [%(default)s]")
    parser.add_argument("--length", type=int, default=32, help="tokens in a row [%(default)s]")
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.batch % MICRO_BATCHES:
        parser.error(f"--batch must be a multiple of {MICRO_BATCHES}, got {args.batch}")
    return args


def _measure(args: argparse.Namespace, report: Report, rows: int | None) -> tuple[int, float, float]:
    """Run one setting; return its micro-batches and the most a step read and wrote per parameter."""
    opened = open_model(args)
    micro_batches = 1 if rows is None else MICRO_BATCHES
    tokens = random_tokens(opened, args.batch, args.length)
    steady: list[list[float]] = []
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-bytes-") as directory:
        runtime = offload.attach(
            opened.model,
            source=opened.source,
            device="cpu",
            disk=[directory],
            host_memory=args.host_memory,
            device_memory=args.device_memory,
            rows=rows,
            moments=args.moments,
        )
        with runtime:
            for step in range(args.warm_up + args.steps):
                before = _counters_at_rest(runtime)
                loss = opened.model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                runtime.step()
                after = _counters_at_rest(runtime)
                values = [
                    (late - early) / opened.num_parameters for early, late in zip(before, after, strict=True)
                ]
                warm_up = step < args.warm_up
                report.sample(
                    micro_batches=micro_batches,
                    step=step + 1,
                    warm_up=warm_up,
                    loss=loss.item(),
                    **{
                        name.replace(" ", "_"): round(value, 4)
                        for name, value in zip(COUNTERS, values, strict=True)
                    },
                )
                if not warm_up:
                    steady.append(values)
    report.say(
        f"## {micro_batches} micro-batch{'es' if rows else ''} of {rows or args.batch} x {args.length} tokens"
    )
    report.say()
    report.say(
        f"{opened.label}, {opened.num_parameters:,} parameters; moments in {args.moments}; host budget"
        f" {args.host_memory}, device budget {args.device_memory}. Direct I/O, no page cache. Bytes per"
        f" parameter and step, {len(steady)} steps after {args.warm_up}:"
    )
    report.say()
    columns = list(zip(*steady, strict=True))
    report.table(
        ("counter", "median", "least", "most"),
        (
            (name, *(f"{figure(values):.3f}" for figure in (statistics.median, min, max)))
            for name, values in zip(COUNTERS, columns, strict=True)
        ),
    )
    if not any(columns[0]):
        report.say("The kernel counted no reads: the directory is not on a block device (tmpfs?).")
        report.say()
    return micro_batches, max(columns[0]), max(columns[1])


def _counters_at_rest(runtime: Runtime) -> tuple[int, ...]:
    """Wait until the runtime's work is done and nothing is read ahead any more; return `COUNTERS`."""
    runtime.synchronize()
    seen, since_s = _io_counters(), time.monotonic()
    while time.monotonic() - since_s < REST_S:
        time.sleep(REST_S / 10)
        now = _io_counters()
        if now != seen:
            seen, since_s = now, time.monotonic()
    stats = runtime.stats()
    return (*seen, stats.disk_read_nbytes, stats.disk_written_nbytes)


def _io_counters() -> tuple[int, int]:
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"]), int(counters["write_bytes"])


if __name__ == "__main__":
    sys.exit(main())
