"""Does a run that is killed again and again end like one that was not?

A child process trains a short run; it is killed with SIGKILL at random moments, spread over the import
and all steps, and started again with the same command, which goes on from the newest commit it finds.
Every loss that any attempt reports, the state that was committed last and every byte of every record
must be those of an unbroken run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import add_model_arguments, open_model, random_tokens
from _report import Report, add_report_arguments

import offload
from offload.aio import open_engine
from offload.store import Store, list_runs, remove_run

QUESTION = "does a killed run end like an unbroken one?"
# Longer than any step or import here; silence beyond it is a hang, and fails.
SILENCE_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 when anything differs."""
    args = _parse(argv)
    if args.train_in is not None:
        return _train(args, str(args.train_in))
    words = list(sys.argv[1:] if argv is None else argv)
    report = Report(__file__, QUESTION, words, args.disk)
    with tempfile.TemporaryDirectory(dir=args.disk, prefix="offload-kill-") as directory:
        unbroken, broken = (_Run(Path(directory) / name, words) for name in ("unbroken", "broken"))
        pace = unbroken.attempt()
        rng = random.Random(args.seed)
        moments: list[float | None] = [
            *sorted(rng.uniform(-1, args.steps - 2) for _ in range(args.kills)),
            None,
        ]
        attempts = [broken.attempt(kill_at=moment, pace=pace) for moment in moments]
        rows = [_row(moment, attempt) for moment, attempt in zip(moments, attempts, strict=True)]
        for row in rows:
            report.sample(**row)
        report.table(list(rows[0]), (row.values() for row in rows))
        report.say(f"Unbroken: {pace.import_s:.2f} s to the first loss, {pace.step_s:.3f} s a step.")
        killed = sum(attempt.status == -signal.SIGKILL for attempt in attempts)
        report.fact(f"{args.kills} of {args.kills} kills hit the running process", killed == args.kills)
        ended = pace.status == attempts[-1].status == 0
        report.fact("the last attempt and the unbroken run ended by themselves", ended)
        if ended:
            _judge(report, open_model(args).label, args, (unbroken, broken))
    return report.finish(args.save)


def _row(moment: float | None, attempt: _Attempt) -> dict[str, object]:
    if moment is None:
        asked = "never"
    elif moment < 0:
        asked = f"{1 + moment:.0%} of the import"
    else:
        asked = f"step {math.floor(moment) + 1} + {moment % 1:.0%}"
    return {
        "killed at": asked,
        "status": attempt.status,
        "resumed at step": "" if attempt.resumed_at is None else attempt.resumed_at,
        "steps reported": len(attempt.steps_s),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parser, "toy")
    parser.add_argument("--disk", type=Path, required=True, metavar="DIR", help="where the state may lie")
    parser.add_argument("--host-memory", default="512MiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--device-memory", default="1GiB", metavar="SIZE", help="[%(default)s]")
    parser.add_argument("--kills", type=int, default=20, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=24, help="of the whole run [%(default)s]")
    parser.add_argument("--moments", choices=("float32", "8bit"), default="float32", help="[%(default)s]")
    parser.add_argument("--rows", type=int, default=2, help="sequences in a step [%(default)s]")
    parser.add_argument("--length", type=int, default=64, help="tokens in a sequence [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    parser.add_argument("--train-in", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    add_report_arguments(parser)
    return parser.parse_args(argv)


# -- the child -----------------------------------------------------------------------------------


def _train(args: argparse.Namespace, disk: str) -> int:
    """Train from the newest commit to the end; say each loss on standard output."""
    print(json.dumps({"event": "started"}), flush=True)
    run_id = _committed_run(disk)
    opened = open_model(args)
    # All generators are part of what is committed and compared.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    runtime = offload.attach(
        opened.model,
        source=opened.source,
        device="cpu",
        disk=[disk],
        run_id=run_id,
        resume=run_id is not None,
        host_memory=args.host_memory,
        device_memory=args.device_memory,
        moments=args.moments,
    )
    with runtime:
        print(json.dumps({"event": "attached", "step": runtime.global_step}), flush=True)
        for step in range(runtime.global_step, args.steps):
            tokens = random_tokens(opened, args.rows, args.length, seed=step)
            loss = opened.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            runtime.step({"next": step + 1})
            print(json.dumps({"event": "step", "step": step, "loss": loss.item().hex()}), flush=True)
    return 0


def _committed_run(disk: str) -> str | None:
    """Return the run to go on with; remove one whose import did not end."""
    for run in list_runs(disk):
        if run.problem is None and run.generation:
            return run.run_id
        if run.problem is None:
            remove_run([disk], run.run_id)
    return None


# -- the parent ----------------------------------------------------------------------------------


@dataclass
class _Attempt:
    """What one child said, and when; a child is asked nothing, so this is all that is known of it."""

    started_s: float = 0.0
    resumed_at: int | None = None
    steps_s: list[float] = field(default_factory=list)
    status: int = 0

    @property
    def import_s(self) -> float:
        """From the start to the first step reported."""
        return self.steps_s[0] - self.started_s

    @property
    def step_s(self) -> float:
        """Mean time of a step."""
        return (self.steps_s[-1] - self.steps_s[0]) / max(1, len(self.steps_s) - 1)


class _Run:
    """The attempts on one directory, and every loss any of them reported.

    Args:
        disk: the directory.
        command: arguments of the child, without its directory.
    """

    def __init__(self, disk: Path, command: Sequence[str]) -> None:
        self.disk = disk
        self.losses: dict[int, set[str]] = {}
        self._command = [sys.executable, __file__, *command, "--train-in", str(disk)]
        self._unread = b""
        disk.mkdir()

    def attempt(self, *, kill_at: float | None = None, pace: _Attempt | None = None) -> _Attempt:
        """Start the child and let it end, or kill it.

        Args:
            kill_at: 3.4 kills when step 3 has been reported, by any attempt, and 0.4 of a step's time
                has passed; -0.3 kills 0.7 of the way to the first step.
            pace: an attempt that says how long an import and a step take.
        """
        attempt = _Attempt()
        self._unread = b""
        with subprocess.Popen(self._command, stdout=subprocess.PIPE, bufsize=0) as child:
            self._listen(child, attempt, time.monotonic() + SILENCE_S)
            if kill_at is not None and pace is not None:
                self._wait_until(kill_at, pace, child, attempt)
                child.kill()
            while self._listen(child, attempt, time.monotonic() + SILENCE_S):
                pass
        attempt.status = child.returncode
        return attempt

    def _wait_until(
        self, moment: float, pace: _Attempt, child: subprocess.Popen[bytes], attempt: _Attempt
    ) -> None:
        whole = math.floor(moment)
        while whole >= 0 and whole not in self.losses:
            if not self._listen(child, attempt, time.monotonic() + SILENCE_S):
                return
        end_s = time.monotonic() + (moment - whole) * (pace.step_s if whole >= 0 else pace.import_s)
        while time.monotonic() < end_s and self._listen(child, attempt, end_s):
            pass

    def _listen(self, child: subprocess.Popen[bytes], attempt: _Attempt, end_s: float) -> bool:
        """Take in the next line of the child; False when it has ended, or said nothing until `end_s`."""
        assert child.stdout is not None
        while b"\n" not in self._unread:
            left_s = max(0.0, end_s - time.monotonic())
            if not select.select([child.stdout], [], [], left_s)[0]:
                return False
            data = os.read(child.stdout.fileno(), 1 << 16)
            if not data:
                return False
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        said = json.loads(line)
        if said["event"] == "started":
            attempt.started_s = time.monotonic()
        elif said["event"] == "attached":
            attempt.resumed_at = said["step"]
        else:
            attempt.steps_s.append(time.monotonic())
            self.losses.setdefault(said["step"], set()).add(said["loss"])
        return True

    def committed(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the state committed last and the SHA-256 of every record."""
        (run,) = [run for run in list_runs(self.disk) if run.generation]
        with open_engine() as engine, Store.open([self.disk], engine=engine, run_id=run.run_id) as store:
            digests = {}
            for name, spec in store.records.items():
                memory = bytearray(spec.nbytes)
                store.read(name, memory).wait()
                digests[name] = hashlib.sha256(memory).hexdigest()
            return dict(store.state), digests


def _judge(report: Report, label: str, args: argparse.Namespace, runs: tuple[_Run, _Run]) -> None:
    unbroken, broken = runs
    found, expected = broken.committed(), unbroken.committed()
    report.say()
    first, last = (float.fromhex(min(unbroken.losses[step])) for step in (0, args.steps - 1))
    report.say(
        f"{label}: {args.steps} steps of {args.rows} x {args.length} tokens, a commit after each;"
        f" {len(found[1])} records. The loss of the unbroken run went from {first:.4f} to {last:.4f}."
    )
    report.say()
    report.fact("every loss of every attempt is that of the unbroken run", broken.losses == unbroken.losses)
    report.fact(
        "the committed state (step, random generators, position) is the same", found[0] == expected[0]
    )
    report.fact("every record is the same, byte for byte", found[1] == expected[1])


if __name__ == "__main__":
    sys.exit(main())
