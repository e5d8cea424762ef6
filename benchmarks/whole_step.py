"""Does a model many times larger than its memory budgets train whole, and go on after a kill?

Trains every parameter of a Llama shape with random weights made tensor by tensor, everything on disk, on
one repeated batch, in a child process whose memory is watched from outside: what no file backs, Python and
torch included. Layers that the device budget does not hold are cut into their parts. With `--kill-at N` the
child is killed with SIGKILL in the middle of the step behind step N, and a second one goes on.

The bars: the peak stays below `--limit`, the loss falls with every step, and the second child begins behind
the last step that was committed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _memory import MemoryWatch
from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload.errors import DiskFullError
from offload.sizes import GIB, format_bytes, parse_bytes
from offload.store import list_runs

QUESTION = "does a model far larger than its memory budgets train whole, and go on after a kill?"
# Weights, residual and moments, and a hundredth for scales, checksums and padding.
DISK_NBYTES_PER_PARAMETER = {"float32": 12.2, "8bit": 6.2}


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when a bar is missed."""
    args = _parse(argv)
    if args.train_in is not None:
        return _train(args)
    words = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-whole-") as directory:
        return _measure(args, words, Path(directory))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "tinyllama-1.1b")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", type=parse_bytes, default=2 * GIB, metavar="SIZE", help="[2GiB]")
    parser.add_argument("--device-memory", type=parse_bytes, default=GIB, metavar="SIZE", help="[1GiB]")
    parser.add_argument("--limit", type=parse_bytes, default=4 * GIB, metavar="SIZE", help="peak [4GiB]")
    parser.add_argument("--moments", choices=("float32", "8bit"), default="8bit", help="[%(default)s]")
    parser.add_argument(
        "--no-commit",
        action="store_true",
        help="one generation in place of two: half the room on the drive, and a kill loses the run",
    )
    parser.add_argument("--kill-at", type=int, default=0, metavar="STEP", help="0 kills never [%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--rows", type=int, default=1, help="sequences in a step [%(default)s]")
    parser.add_argument("--length", type=int, default=32, help="tokens in a sequence [%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="[%(default)s]")
    parser.add_argument("--train-in", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.no_commit and args.kill_at:
        parser.error("--kill-at needs commits: leave --no-commit out")
    if not 0 <= args.kill_at < args.steps:
        parser.error(f"--kill-at must be 0, or a step before the last of {args.steps}")
    return args


# -- the child -----------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    """Train from the newest commit to the end; say what each step was on standard output."""
    found = [run.run_id for run in list_runs(args.train_in) if run.problem is None and run.generation]
    opened = open_model(args)
    settings: dict[str, Any] = {"commit": False} if args.no_commit else {}
    if found:
        settings |= {"run_id": found[0], "resume": True}
    runtime = offload.attach(
        opened.model,
        source=opened.source,
        device="cpu",
        disk=[args.train_in],
        host_memory=args.host_memory,
        device_memory=args.device_memory,
        moments=args.moments,
        optimizer=offload.AdamWOptions(lr=args.learning_rate),
        **settings,
    )
    tokens = random_tokens(opened, args.rows, args.length)
    with runtime:
        _say(event="attached", step=runtime.global_step)
        for step in range(runtime.global_step, args.steps):
            runtime.reset_stats()
            began_s = time.monotonic()
            loss = opened.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            runtime.step()
            runtime.synchronize()
            stats = runtime.stats()
            _say(
                event="step",
                step=step + 1,
                loss=loss.item(),
                step_s=time.monotonic() - began_s,
                read_nbytes=stats.disk_read_nbytes,
                written_nbytes=stats.disk_written_nbytes,
                host_nbytes=stats.host_high_water_nbytes,
                device_nbytes=stats.device_high_water_nbytes,
            )
    return 0


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


# -- the parent ----------------------------------------------------------------------------------


@dataclass
class _Attempt:
    """One child: what it said, its memory, and how it ended."""

    number: int
    attached: dict[str, Any]
    steps: list[dict[str, Any]]
    watch: MemoryWatch
    status: int

    @property
    def peak_nbytes(self) -> int:
        """The most of it that no file backed."""
        return max((nbytes for _, nbytes in self.watch.samples), default=0)


def _measure(args: argparse.Namespace, words: Sequence[str], directory: Path) -> int:
    report = Report(__file__, QUESTION, words, directory)
    opened = open_model(args)
    state_nbytes = int(opened.num_parameters * DISK_NBYTES_PER_PARAMETER[args.moments])
    needed_nbytes = state_nbytes * (1 if args.no_commit else 2)
    _check_room(directory, needed_nbytes)
    command = [sys.executable, __file__, *words, "--train-in", str(directory)]
    attempts = [_attempt(1, command, args.kill_at)]
    if args.kill_at:
        attempts.append(_attempt(2, command, 0))
    steps = [(attempt, step) for attempt in attempts for step in attempt.steps]
    for attempt, step in steps:
        report.sample(attempt=attempt.number, **{key: step[key] for key in step if key != "event"})
    report.say(
        f"{opened.label}, {opened.num_parameters:,} parameters, {format_bytes(state_nbytes)} of state on"
        f" disk{', in one generation' if args.no_commit else ' in each of two generations'};"
        f" {args.rows} x {args.length} tokens a step. Budgets: host {format_bytes(args.host_memory)}, device"
        f" {format_bytes(args.device_memory)}. Memory is RssAnon + RssShmem of the whole process, read every"
        " 4 ms by another one."
    )
    report.say()
    report.table(
        ("attempt", "step", "loss", "time", "read", "written", "under lease: host", "device"),
        (
            (
                attempt.number,
                step["step"],
                f"{step['loss']:.4f}",
                f"{step['step_s']:.1f} s",
                *(format_bytes(step[f"{key}_nbytes"]) for key in ("read", "written", "host", "device")),
            )
            for attempt, step in steps
        ),
    )
    for attempt in attempts:
        ended = "was killed" if attempt.status < 0 else f"ended with status {attempt.status}"
        report.say(
            f"- attempt {attempt.number} was attached after {attempt.attached['after_s']:.1f} s at step"
            f" {attempt.attached['step']}, had at most {format_bytes(attempt.peak_nbytes)}, and {ended}"
        )
    peak_nbytes = max(attempt.peak_nbytes for attempt in attempts)
    report.bar("peak of anonymous memory", peak_nbytes / GIB, args.limit / GIB, "GiB")
    losses = [step["loss"] for _, step in steps]
    report.fact("the loss falls with every step", all(b < a for a, b in itertools.pairwise(losses)))
    if args.kill_at:
        last, begun = attempts[0].steps[-1]["step"], attempts[1].attached["step"]
        report.fact("the first child was killed", attempts[0].status < 0)
        # One that was committed may not have been said yet.
        report.fact("the second went on behind the last step that was committed", begun - last in (0, 1))
    return report.finish(args.save)


def _attempt(number: int, command: Sequence[str], kill_at: int) -> _Attempt:
    """Let a child train; kill it half a step behind step `kill_at`, unless that is 0."""
    began_s = time.monotonic()
    said: list[dict[str, Any]] = []
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child,
        MemoryWatch(child.pid) as watch,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            said.append({**json.loads(line), "after_s": time.monotonic() - began_s})
            if kill_at and said[-1]["event"] == "step" and said[-1]["step"] == kill_at:
                # Steps vary: the next one may be over by then, and its line is read like any other.
                time.sleep(said[-1]["step_s"] / 4)
                child.kill()
    if not said:
        raise SystemExit(f"the child could not attach the model: it ended with status {child.returncode}")
    return _Attempt(number, said[0], said[1:], watch, child.returncode)


def _check_room(directory: Path, needed_nbytes: int) -> None:
    free_nbytes = shutil.disk_usage(directory).free
    if free_nbytes < needed_nbytes:
        raise DiskFullError(
            f"{directory} has {format_bytes(free_nbytes)} free and the run takes about"
            f" {format_bytes(needed_nbytes)}; name another directory with --disk, or give --no-commit",
            errno=28,
            path=str(directory),
        )


if __name__ == "__main__":
    sys.exit(main())
