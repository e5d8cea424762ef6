"""No call of an engine keeps the interpreter from other threads, however long a drive takes.

A child makes the call while a system call that it needs is held inside the kernel; another thread of
that child must be able to run Python meanwhile. The order of events is forced, nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sanitize.held_calls import PATIENCE_S, HeldChild, Stuck, missing_reason

from offload.aio import probe_engines

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())

CHILD = Path(__file__).resolve().parents[1] / "sanitize" / "gil_child.py"
ENGINES = ("uring", "threads", "portable")

# The main thread lets go of the interpreter once or more often inside a call. After so many ticks
# with a chance for it to come back each time, it is where it stays.
NUM_TICKS = 50


@contextmanager
def child(engine: str, case: str, folder: Path, patience_s: float = PATIENCE_S) -> Iterator[HeldChild]:
    """The child, about to make the call, with a system call held or going to be."""
    available = {row.name: row for row in probe_engines()}[engine]
    if not available.available:
        pytest.skip(available.reason)
    arguments = (case, engine, str(folder))
    with HeldChild(CHILD, *arguments, patience_s=patience_s) as started:
        said = started.start()
        if said != "ready":
            pytest.skip(said)
        verb, *calls = started.heard().split()
        assert verb == "hold"
        started.hold(*calls)
        started.tell("go")
        yield started


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["open", "size_nbytes", "allocate", "sync", "file.close", "file dropped"])
def test_python_runs_while_a_call_is_in_the_kernel(engine: str, case: str, tmp_path: Path) -> None:
    with child(engine, case, tmp_path) as held:
        held.held()
        assert held.heard_from_any() == "inside"
        assert held.tick() == "during"
        held.let_go()
        assert held.heard() == "returned"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "case",
    [
        "wait",
        "wait with timeout",
        "file.close in flight",
        "engine.close in flight",
        "engine dropped in flight",
    ],
)
def test_python_runs_while_a_call_waits_for_a_transfer(engine: str, case: str, tmp_path: Path) -> None:
    if (engine, case) == ("portable", "engine dropped in flight"):
        pytest.skip("its work goes on, but dropping it waits for none of it")
    with child(engine, case, tmp_path) as held:
        assert held.heard() == "wait"
        held.held()
        held.tell("go")
        assert held.heard_from_any() == "inside"
        assert {held.tick() for _ in range(NUM_TICKS)} == {"during"}
        held.let_go()
        assert held.heard() == "returned"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "case",
    [
        "submit",
        "done",
        "cancel",
        "request dropped in flight",
        "file dropped in flight",
        "size_nbytes in flight",
    ],
)
def test_a_call_returns_while_a_transfer_hangs(engine: str, case: str, tmp_path: Path) -> None:
    with child(engine, case, tmp_path) as held:
        assert held.heard() == "wait"
        held.held()
        held.tell("go")
        assert held.heard() == "returned"
        held.let_go()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", ["size_nbytes while closing", "submit while closing"])
def test_python_runs_while_another_thread_closes_the_file(engine: str, case: str, tmp_path: Path) -> None:
    with child(engine, case, tmp_path) as held:
        assert held.heard() == "wait"
        held.held()
        held.tell("go")
        first = held.heard_from_any()  # it waits for the other thread, or is refused at once
        if first == "inside":
            for _ in range(NUM_TICKS):
                held.tick()
        held.let_go()
        if first != "returned":
            assert held.heard() == "returned"


def test_a_call_that_keeps_the_interpreter_is_noticed(tmp_path: Path) -> None:
    """The check itself: a call to the C library that does not let go."""
    with child("threads", "kept", tmp_path, patience_s=2) as held:
        held.held()
        with pytest.raises(Stuck):
            held.heard_from_any()
