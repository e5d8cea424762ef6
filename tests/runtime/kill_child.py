"""Trains a toy model from the newest commit it finds; test_kill.py starts it again and again.

One interpreter imports torch once and forks a process for each attempt, which is what dies: a fork
takes milliseconds, an import seconds. Lines of JSON on stdin, lines of words on stdout:

    {"disk": DIR, "steps": N, "die": [POINT, COUNT] or null, "hold": BOOL, "settings": {...}}
                                                                ->  pid P, step I LOSS, ..., end
    {}  (wait for the process and say how it ended)             ->  exit STATUS

A POINT is one of `POINTS`; the process kills itself when it comes there for the COUNT-th time after
its first new step, or during the import for `import`. With `hold` it waits to be killed when it is done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from toy_models import SETTINGS, build, loss_of, make_batch

import offload
import offload.runtime.storage
from offload.store import list_runs, remove_run
from offload.store.rundir import RunDirectory

POINTS = ("import", "backward", "write", "before sync", "after sync", "before rename", "after rename")

NAME = "gpt2"
SILENCE_S = 50.0


def say(*words: object) -> None:
    """Write a line in one call: another thread may kill the process in the midst of print's several."""
    os.write(sys.stdout.fileno(), (" ".join(map(str, words)) + "\n").encode())


class Trap:
    """Ends the process at the n-th passage of one point."""

    def __init__(self, point: str, count: int) -> None:
        self.point = point
        self.left = count
        self.armed = point == "import"

    def passing(self, point: str) -> None:
        if self.armed and point == self.point:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


class WatchedEngine:
    """An I/O engine that tells a trap what it does."""

    def __init__(self, engine: Any, trap: Trap) -> None:
        self._engine = engine
        self._trap = trap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, op: str, *args: Any, **kwargs: Any) -> Any:
        if op == "write":
            self._trap.passing("write")
            self._trap.passing("import")
        return self._engine.submit(op, *args, **kwargs)

    def sync(self, file: Any) -> None:
        self._trap.passing("before sync")
        self._engine.sync(file)
        self._trap.passing("after sync")


def set_trap(trap: Trap) -> None:
    """Wrap what the runtime calls; this process is about to end, so nothing is put back."""
    open_engine: Callable[..., Any] = offload.runtime.storage.open_engine
    publish = RunDirectory.publish

    def watched_engine(*args: Any, **kwargs: Any) -> Any:
        return WatchedEngine(open_engine(*args, **kwargs), trap)

    def watched_publish(folder: RunDirectory, name: str) -> None:
        trap.passing("before rename")
        publish(folder, name)
        trap.passing("after rename")

    offload.runtime.storage.open_engine = watched_engine
    RunDirectory.publish = watched_publish


def committed_run(disk: str) -> str | None:
    """Return the run to go on with; remove one whose import did not end."""
    for run in list_runs(disk):
        if run.problem is None and run.generation:
            return run.run_id
        if run.problem is None:
            remove_run([disk], run.run_id)
    return None


def train(disk: str, steps: int, trap: Trap, settings: dict[str, Any]) -> None:
    run_id = committed_run(disk)
    model = build(NAME)
    # A fork seeds `random` anew, and all generators are part of what is committed.
    random.seed(5)
    torch.manual_seed(5)
    chosen = {**SETTINGS, **settings, "run_id": run_id, "resume": run_id is not None}
    with offload.attach(model, disk=[disk], **chosen) as runtime:
        for step in range(runtime.global_step, steps):
            loss = loss_of(NAME, model, make_batch(NAME, step))
            loss.backward()
            trap.passing("backward")
            runtime.step({"next": step + 1})
            say("step", step, loss.item().hex())
            trap.armed = True


def attempt(order: dict[str, Any]) -> None:
    # The test waits a minute for a line. Before that, say what each thread is doing.
    faulthandler.dump_traceback_later(SILENCE_S, repeat=True)
    say("pid", os.getpid())
    trap = Trap(*(order["die"] or ("nowhere", 0)))
    set_trap(trap)
    try:
        train(order["disk"], order["steps"], trap, order["settings"])
    finally:
        say("end")


def main() -> None:
    say("ready")
    child = 0
    for line in sys.stdin:
        order = json.loads(line)
        if order:
            child = os.fork()
            if not child:
                with contextlib.suppress(KeyboardInterrupt):
                    attempt(order)
                    while order["hold"]:
                        signal.pause()
                    os._exit(0)
                os._exit(1)
        else:
            _, status = os.waitpid(child, 0)
            say("exit", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
