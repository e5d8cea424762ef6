"""What do checksums cost in a step that the disk bounds?

Every chunk that a step writes is summed before, and every chunk that it reads is verified before it is used.
The same training from disk runs with checksums and, in turn, with a function in their place that returns a
constant; few tokens, so that the disk sets the pace. The time inside the function is measured too, over
all threads: a step cannot pay more than that, and what overlaps with transfers costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(args.rounds):
        # Who is first changes, so that a drive that gets slower favours neither.
        for name in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
            measured = _measure(args, name)
            steps[name] += measured
            for step in measured:
                report.sample(round=number + 1, contender=name, **step)
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
    report.say(f"Inside the function, over all threads: {share:.1%} of a step.")
    report.say()
    report.bar("step with / without checksums, medians", seconds["with"] / seconds["without"], BAR)
    return report.finish(args.save)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "100m")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--warm-up", type=int, default=2, metavar="STEPS", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=5, help="measured, of a round [%(default)s]")
    parser.add_argument("--length", type=int, default=8, help="tokens of a step [%(default)s]")
    add_report_arguments(parser)
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace, contender: str) -> list[dict[str, float]]:
    """Train a new run; return what each steady step took."""
    opened = open_model(args)
    tokens = random_tokens(opened, 1, args.length)
    found = []
    with (
        tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-checksums-") as directory,
        _summing(crc32c if contender == "with" else _constant) as spent,
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
        for step in range(args.warm_up + args.steps):
            before, moved = spent.now(), _moved(runtime)
            began_s = time.perf_counter()
            loss = opened.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            runtime.step()
            runtime.synchronize()
            step_s = time.perf_counter() - began_s
            after = spent.now()
            if step >= args.warm_up:
                found.append(
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
    """Seconds and bytes of a function that several threads call."""

    def __init__(self, function: Callable[[Any, int], int]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._nbytes = 0

    def __call__(self, buffer: Any, seed: int = 0) -> int:
        began_s = time.perf_counter()
        value = self._function(buffer, seed)
        ended_s = time.perf_counter()
        with self._lock:
            self._seconds += ended_s - began_s
            self._nbytes += memoryview(buffer).nbytes
        return value

    def now(self) -> tuple[float, int]:
        """Return both, since the beginning."""
        with self._lock:
            return self._seconds, self._nbytes


def _constant(buffer: Any, seed: int) -> int:
    return 0


@contextmanager
def _summing(function: Callable[[Any, int], int]) -> Iterator[_Spent]:
    """Let the store sum chunks by `function` inside the block; manifests keep their checksums."""
    spent = _Spent(function)
    with patch("offload.store.span.crc32c", spent), patch("offload.store.ticket.crc32c", spent):
        yield spent


if __name__ == "__main__":
    sys.exit(main())
