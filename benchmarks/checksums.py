"""What do checksums cost in a step that the disk bounds?

Every chunk that a step writes is summed, and every chunk that it reads is verified before it is used. One
training from disk runs with steps that do so and steps that do not, in turn, so that a drive that gets slower
favours neither; few tokens, so that the disk sets the pace. What the function returns is replaced by a
constant in both, or a step could not read what the one before has written. The time inside the function is
measured too, over all threads: a step cannot pay more, and what overlaps with transfers costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload.aio import crc32c

QUESTION = "what do checksums cost in a step that the disk bounds?"
BAR = 1.03
CONTENDERS = ("with", "without")


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when the bar is missed."""
    args = _parse(argv)
    report = Report(__file__, QUESTION, sys.argv[1:] if argv is None else argv, args.disk)
    steps = _measure(args)
    for name in CONTENDERS:
        for number, step in enumerate(steps[name], 1):
            report.sample(pair=number, contender=name, **step)
    seconds = {name: statistics.median(step["step_s"] for step in steps[name]) for name in CONTENDERS}
    rows = []
    for name in CONTENDERS:
        values = {key: [step[key] for step in steps[name]] for key in steps[name][0]}
        rows.append(
            (
                name,
                f"{seconds[name]:.3f} [{min(values['step_s']):.3f}..{max(values['step_s']):.3f}]",
                f"{statistics.median(values['checksum_s']):.3f}",
                f"{statistics.median(values['checksum_nbytes']) / 1e9:.2f}",
                f"{statistics.median(values['transferred_nbytes']) / 1e9:.2f}",
            )
        )
    report.table(("checksums", "step, s", "inside the function, s", "GB summed", "GB moved"), rows)
    share = statistics.median(step["checksum_s"] / step["step_s"] for step in steps["with"])
    report.say(f"{args.pairs} pairs of steps. Inside the function, over all threads: {share:.1%} of a step.")
    report.say()
    report.bar("step with / without checksums, medians", seconds["with"] / seconds["without"], BAR)
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "100m")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, metavar="PAIRS", help="[%(default)s]")
    parser.add_argument("--pairs", type=int, default=40, help="of steps, measured [%(default)s]")
    parser.add_argument("--length", type=int, default=8, help="tokens of a step [%(default)s]")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Train a new run, its steps with and without checksums in turn; return what each took."""
    opened = open_model(args)
    tokens = random_tokens(opened, 1, args.length)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with (
        tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-checksums-") as directory,
        _summing() as spent,
        offload.attach(
            opened.model,
            source=opened.source,
            device="cpu",
            disk=[directory],
            host_memory=args.host_memory,
            device_memory=args.device_memory,
        ) as runtime,
    ):
        runtime.synchronize()
        for pair in range(args.warm_up + args.pairs):
            # Who is first changes, too.
            for name in CONTENDERS if pair % 2 == 0 else CONTENDERS[::-1]:
                spent.enabled = name == "with"
                before, moved = spent.now(), _moved(runtime)
                began_s = time.perf_counter()
                loss = opened.model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                runtime.step()
                runtime.synchronize()
                step_s = time.perf_counter() - began_s
                after = spent.now()
                if pair >= args.warm_up:
                    found[name].append(
                        {
                            "step_s": step_s,
                            "checksum_s": after[0] - before[0],
                            "checksum_nbytes": after[1] - before[1],
                            "transferred_nbytes": _moved(runtime) - moved,
                        }
                    )
    return found


def _moved(runtime: offload.Runtime) -> int:
    stats = runtime.stats()
    return stats.disk_read_nbytes + stats.disk_written_nbytes


class _Spent:
    """In place of crc32c: computes it where `enabled`, returns a constant; counts over all threads."""

    def __init__(self) -> None:
        self.enabled = True
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._nbytes = 0

    def __call__(self, buffer: Any, seed: int = 0) -> int:
        if not self.enabled:
            return 0
        began_s = time.perf_counter()
        crc32c(buffer, seed)
        ended_s = time.perf_counter()
        with self._lock:
            self._seconds += ended_s - began_s
            self._nbytes += memoryview(buffer).nbytes
        return 0

    def now(self) -> tuple[float, int]:
        """Return both, since the beginning."""
        with self._lock:
            return self._seconds, self._nbytes


@contextmanager
def _summing() -> Iterator[_Spent]:
    """Let the store sum chunks by what is returned inside the block; manifests keep their checksums."""
    spent = _Spent()
    with patch("offload.store.span.crc32c", spent), patch("offload.store.ticket.crc32c", spent):
        yield spent


if __name__ == "__main__":
    sys.exit(main())
