"""Does training a model that is far larger than its budgets stay within them?

Trains a Llama shape with random weights made tensor by tensor, everything on disk, and watches the
memory of the process that no file backs, from its value after imports on. The bar: the peak is at most
10 % above the sum of the host and device budgets (the device is the CPU stand-in, so both are
anonymous memory of this process). The loss on the repeated batch must fall.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _memory import MemoryWatch, private_nbytes
from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
import offload.runtime.compose
from offload.errors import DiskFullError
from offload.sizes import GIB, format_bytes, parse_bytes

QUESTION = "does training stay within its memory budgets?"
# 2 + 10 bytes a parameter (bf16 weights, residual, moments) on two extents each.
DISK_NBYTES_PER_PARAMETER = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when the bar is missed."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-bounded-") as directory:
        return _measure(args, list(sys.argv[1:] if argv is None else argv), Path(directory))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "tinyllama-1.1b")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", type=parse_bytes, default=GIB, metavar="SIZE", help="[1GiB]")
    parser.add_argument("--device-memory", type=parse_bytes, default=GIB, metavar="SIZE", help="[1GiB]")
    parser.add_argument("--steps", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--rows", type=int, default=1, help="sequences in a step [%(default)s]")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence [%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="[%(default)s]")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace, argv: Sequence[str], directory: Path) -> int:
    report = Report(__file__, QUESTION, argv, directory)
    base_nbytes = private_nbytes()
    phases: list[tuple[str, float, float]] = []
    losses: list[float] = []
    with MemoryWatch(os.getpid()) as watch:
        began_s = time.monotonic()
        opened = open_model(args)
        _check_room(directory, opened.num_parameters)
        runtime = offload.attach(
            opened.model,
            source=opened.source,
            device="cpu",
            disk=[directory],
            host_memory=args.host_memory,
            device_memory=args.device_memory,
            optimizer=offload.AdamWOptions(lr=args.learning_rate),
        )
        tokens = random_tokens(opened, args.rows, args.length)
        with runtime:
            phases.append(("import", began_s, time.monotonic()))
            for step in range(args.steps):
                start_s = time.monotonic()
                loss = opened.model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                runtime.step()
                runtime.synchronize()
                losses.append(loss.item())
                phases.append((f"step {step + 1}", start_s, time.monotonic()))
                print(f"step {step + 1}: loss {losses[-1]:.4f}, {phases[-1][2] - start_s:.1f} s", flush=True)
            stats = runtime.stats()
    for time_s, nbytes in watch.samples:
        report.sample(time_s=round(time_s - began_s, 2), private_nbytes=nbytes - base_nbytes)
    budgets_nbytes = args.host_memory + args.device_memory
    state_nbytes = opened.num_parameters * DISK_NBYTES_PER_PARAMETER // 2
    report.say(
        f"{opened.label}, {opened.num_parameters:,} parameters, {format_bytes(state_nbytes)} of state on"
        f" disk, {args.rows} x {args.length} tokens a step. Budgets: host {format_bytes(args.host_memory)},"
        f" device {format_bytes(args.device_memory)}. After imports the process had"
        f" {format_bytes(base_nbytes)}, which is subtracted. Memory is RssAnon + RssShmem, read every 4 ms by"
        " another process. Direct I/O, no page cache."
    )
    report.say()
    report.table(
        ("phase", "time", "loss", "peak", "of the budgets"),
        (
            (name, f"{end_s - start_s:.1f} s", loss, format_bytes(peak), f"{peak / budgets_nbytes:.1%}")
            for (name, start_s, end_s), loss in zip(
                phases, ["", *(f"{loss:.4f}" for loss in losses)], strict=True
            )
            for peak in [watch.peak_nbytes(start_s, end_s) - base_nbytes]
        ),
    )
    host, device = map(format_bytes, (stats.host_high_water_nbytes, stats.device_high_water_nbytes))
    report.say(f"- under lease at most: host {host}, device {device}; torch's own temporaries come on top")
    peak_nbytes = max(nbytes for _, nbytes in watch.samples) - base_nbytes
    report.bar("peak above imports", peak_nbytes / GIB, 1.1 * budgets_nbytes / GIB, "GiB")
    falls = all(after < before for before, after in itertools.pairwise(losses))
    report.fact("the loss falls with every step", falls)
    return report.finish(args.save)


def _check_room(directory: Path, num_parameters: int) -> None:
    needed_nbytes = num_parameters * DISK_NBYTES_PER_PARAMETER
    free_nbytes = shutil.disk_usage(directory).free
    if free_nbytes < needed_nbytes:
        raise DiskFullError(
            f"{directory} has {format_bytes(free_nbytes)} free and the run takes"
            f" {format_bytes(needed_nbytes)}; name another directory with --disk",
            errno=28,
            path=str(directory),
        )


if __name__ == "__main__":
    sys.exit(main())
