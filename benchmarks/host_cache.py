"""How many bytes does a cache in host memory keep off the drives, and how much time?

A part of the records lives in host memory for the whole run: nothing of it, a quarter, a half, three
quarters, all. Each is trained for a whole interval between commits, the commit at its end included.
The losses must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload.codec import RecordFormat
from offload.sizes import format_bytes, parse_bytes
from offload.specs import MomentDType
from offload.tiers.records import record_sets
from offload.units import find_units

QUESTION = "how many bytes and seconds does a cache in host memory save?"
SHARES = tuple(Fraction(quarters, 4) for quarters in range(5))
# With half of the records in memory the drives move half of the bytes, within 5 %.
HALF, BAR = Fraction(1, 2), 0.525


@dataclass(frozen=True)
class _Figures:
    """Of one share: bytes per parameter and step, seconds of a step, and the losses."""

    cached_nbytes: int
    read: float
    written: float
    step_s: float
    losses: tuple[float, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    found = {share: _measure(args, report, share) for share in SHARES}
    plain = found[Fraction(0)]
    report.say(
        f"Moments in {args.moments}, a commit every {args.steps} steps, which are the ones that are measured,"
        f" behind {args.warm_up}. {args.batch} rows of {args.length} tokens a step. Host memory:"
        f" {args.host_memory} and the cache. Direct I/O, no page cache."
    )
    report.say()
    columns = ("cached", "bytes", "read", "written", "of the bytes", "a step", "bar")
    report.table(columns, [_row(share, one, plain) for share, one in found.items()])
    report.say("Read and written: bytes for each parameter and step, the commit's included.")
    report.say()
    half = found[HALF]
    moved = (half.read + half.written) / (plain.read + plain.written)
    report.bar("of the bytes, half of the records in memory", moved, BAR)
    report.fact("the same losses, whatever is cached", len({one.losses for one in found.values()}) == 1)
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "100m")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="beside it [%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--moments", choices=("float32", "8bit"), default="float32", help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, metavar="STEPS", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=20, help="between commits [%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step [%(default)s]")
    parser.add_argument("--length", type=int, default=32, help="tokens in a row [%(default)s]")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace, report: Report, share: Fraction) -> _Figures:
    opened = open_model(args)
    tokens = random_tokens(opened, args.batch, args.length)
    cache_nbytes = int(_state_nbytes(opened.model, args.moments) * share)
    seconds, losses = [], []
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-cache-") as directory:
        runtime = offload.attach(
            opened.model,
            source=opened.source,
            device="cpu",
            disk=[directory],
            host_memory=parse_bytes(args.host_memory) + cache_nbytes,
            host_cache_nbytes=cache_nbytes,
            device_memory=args.device_memory,
            moments=args.moments,
            # Commits are asked for below: one at the end of the warm-up, and one at the end.
            save_steps=1 << 30,
        )
        with runtime:
            for step in range(args.warm_up + args.steps):
                began_s = time.perf_counter()
                loss = opened.model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                runtime.step()
                is_last = step + 1 in (args.warm_up, args.warm_up + args.steps)
                if is_last:
                    runtime.commit()
                    runtime.synchronize()
                losses.append(loss.item())
                seconds.append(time.perf_counter() - began_s)
                report.sample(
                    cached=float(share),
                    step=step + 1,
                    warm_up=step < args.warm_up,
                    committed=is_last,
                    loss=losses[-1],
                    seconds=round(seconds[-1], 4),
                )
                if step + 1 == args.warm_up:
                    runtime.reset_stats()
            stats = runtime.stats()
            per_step = opened.num_parameters * args.steps
            return _Figures(
                runtime.plan.host_cache_nbytes,
                stats.disk_read_nbytes / per_step,
                stats.disk_written_nbytes / per_step,
                statistics.median(seconds[args.warm_up :]),
                tuple(losses),
            )


def _state_nbytes(model: torch.nn.Module, moments: MomentDType) -> int:
    """Bytes of all records of a run."""
    layouts = (unit.layout for unit in find_units(model))
    records = record_sets(layouts, RecordFormat(moments=moments), torch.float32)
    return sum(unit.host_nbytes + unit.optimizer_nbytes for unit in records.values())


def _row(share: Fraction, one: _Figures, plain: _Figures) -> tuple[str, ...]:
    moved = (one.read + one.written) / (plain.read + plain.written)
    return (
        str(share),
        format_bytes(one.cached_nbytes),
        f"{one.read:.2f}",
        f"{one.written:.2f}",
        f"{moved:.3f}",
        f"{one.step_s:.2f} s",
        "#" * round(30 * moved),
    )


if __name__ == "__main__":
    sys.exit(main())
