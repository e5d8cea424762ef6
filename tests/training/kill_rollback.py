"""Runs a fine-tuning that goes back to a snapshot, and kills it while it does; test_rollback.py calls it.

    kill_rollback.py CONFIG ROOT            trains into ROOT/whole; prints every event, one a line
    kill_rollback.py CONFIG ROOT NUMBER...  for each: a run in ROOT/killed-NUMBER is killed at that event,
                                            and started again until its end

Events are what a snapshot, a restoration, a removal, and the loop behind a rollback do to files. One
interpreter imports torch once and forks a process for each run. The losses of batches 5 and 6 are NaN.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import offload.training.finetune
import offload.training.loop
from offload.store import Store
from offload.store.rundir import RunDirectory
from offload.training.config import load_config
from offload.training.data import Batches
from offload.training.guard import StepGuard
from offload.training.output import OutputDirectory

BAD = (5, 6)


class Events:
    """Counts what happens inside the acts that are watched, and kills the process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.seen: list[str] = []
        self.acts: list[str] = []

    def happens(self, what: str) -> None:
        if not self.acts:
            return
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(f"{self.acts[-1]}: {re.sub('[0-9]+-[0-9]+', lambda m: m[0].split('-')[0], what)}")

    def act(self, owner: type, name: str, title: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.acts.append(title)
            try:
                return original(*args, **kwargs)
            finally:
                self.acts.pop()

        setattr(owner, name, watched)

    def watch(self, owner: type, name: str, *, both: bool = True) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(this: Any, *args: Any, **kwargs: Any) -> Any:
            detail = f" {args[0]}" if name in ("publish", "discard") else ""
            self.happens(f"before {name}{detail}" if both else name)
            result = original(this, *args, **kwargs)
            if both:
                self.happens(f"after {name}{detail}")
            return result

        setattr(owner, name, watched)


def train(config: Path, directory: Path, kill_at: int | None) -> Events:
    """Train to the end or the kill; this process is about to end, so nothing is put back."""
    events = Events(kill_at)
    for owner, name, title in [
        (Store, "snapshot", "snapshot"),
        (Store, "restore", "restore"),
        (Store, "drop_snapshot", "drop"),
        (StepGuard, "_went_back", "went back"),
    ]:
        events.act(owner, name, title)
    for owner, name in [
        (RunDirectory, "publish"),
        (RunDirectory, "discard"),
        (OutputDirectory, "append_metrics"),
        (OutputDirectory, "cut_metrics"),
    ]:
        events.watch(owner, name)
    events.watch(Store, "write", both=False)
    batch, backward = Batches.batch, offload.training.loop._backward
    numbers: list[int] = []

    def noted(self: Batches, number: int) -> Any:
        numbers.append(number + 1)
        return batch(self, number)

    def poisoned(*args: Any) -> tuple[float, str]:
        return (math.nan, "the loss is nan") if numbers[-1] in BAD else backward(*args)

    Batches.batch = noted  # type: ignore[method-assign]
    offload.training.loop._backward = poisoned
    offload.training.finetune.finetune(
        load_config(config, {"output_dir": str(directory)}), echo=lambda _: None
    )
    return events


def in_a_fork(act: Callable[[], None]) -> int:
    """Run `act` in another process and return how it ended."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            act()
            sys.stdout.flush()
        finally:
            os._exit(1 if sys.exc_info()[1] is not None else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(config: Path, root: Path, *points: str) -> None:
    if not points:
        in_a_fork(lambda: print("\n".join(train(config, root / "whole", None).seen)))
    for point in points:
        directory = root / f"killed-{point}"
        killed = in_a_fork(lambda at=int(point), into=directory: train(config, into, at))
        done = in_a_fork(lambda into=directory: train(config, into, None))
        killed_so = {-signal.SIGKILL: "killed"}.get(killed, f"ended {killed}")
        print(f"{point} {killed_so}, {'done' if done == 0 else f'ended {done}'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
