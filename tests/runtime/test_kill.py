"""A run that is killed and started again ends with the bytes and losses of one that was not."""

from __future__ import annotations

import json
import math
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from offload.aio import open_engine
from offload.store import Store, list_runs

HERE = Path(__file__).resolve().parent
STEPS = 12
KILLS = 8


class Trainer:
    """The process that trains; see kill_child.py."""

    def __init__(self) -> None:
        path = os.pathsep.join(str(folder) for folder in (HERE.parent, HERE.parents[1]))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._unread = b""
        assert self.line() == ["ready"]

    def line(self, timeout_s: float = 60.0) -> list[str] | None:
        """Return the words of the next line, None when none comes in time."""
        assert self.process.stdout is not None
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([self.process.stdout], [], [], left_s)[0]:
                return None
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, "the process that starts the attempts has ended"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode().split()

    def send(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass
class Run:
    """The attempts on one directory, every loss any of them reported, and how long things took.

    Attributes:
        import_s: from the start of an attempt to its first step.
        step_s: of one step.
        settings: options of the run beside the toy models'.
    """

    trainer: Trainer
    disk: Path
    import_s: float = 0.0
    step_s: float = 0.0
    losses: dict[int, set[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def attempt(self, *, kill_at: float | None = None, die: tuple[str, int] | None = None) -> int:
        """Train until the end or the kill and return the exit status.

        Args:
            kill_at: 3.4 kills when step 3 has been reported, by any attempt, and 0.4 of a step's time
                has passed; -0.3 kills 0.7 of the way to the first step.
            die: a point where the process ends itself.
        """
        self._order(die=die, hold=kill_at is not None)
        started = self.trainer.line()
        assert started is not None and started[0] == "pid"
        if kill_at is not None:
            self._wait_until(kill_at)
            # It is not waited for before this, so the number cannot be another process's.
            os.kill(int(started[1]), signal.SIGKILL)
        self.trainer.send()
        while (words := self.trainer.line()) is not None and words[0] != "exit":
            self._note(words)
        assert words is not None
        return int(words[1])

    def measure(self) -> None:
        """Train to the end, and note how long that takes."""
        times_s = [time.monotonic()]
        self._order(die=None, hold=False)
        while (words := self.trainer.line()) != ["end"]:
            self._note(words)
            times_s.append(time.monotonic())
        self.trainer.send()
        assert self.trainer.line() == ["exit", "0"]
        # The first line is its number.
        self.import_s = times_s[2] - times_s[0]
        self.step_s = (times_s[-1] - times_s[2]) / (STEPS - 1)

    def _order(self, **order: Any) -> None:
        self.trainer.send(disk=str(self.disk), steps=STEPS, settings=self.settings, **order)

    def _wait_until(self, moment: float) -> None:
        whole = math.floor(moment)
        while whole >= 0 and whole not in self.losses:
            self._note(self.trainer.line())
        end_s = time.monotonic() + (moment - whole) * (self.step_s if whole >= 0 else self.import_s)
        while (left_s := end_s - time.monotonic()) > 0:
            words = self.trainer.line(left_s)
            if words is not None:
                self._note(words)

    def _note(self, words: list[str] | None) -> None:
        assert words is not None, "the process has said nothing for a minute"
        if words[0] == "step":
            self.losses.setdefault(int(words[1]), set()).add(words[2])

    def result(self) -> tuple[dict[int, set[str]], dict[str, Any], dict[str, bytes]]:
        """Return the losses, the committed state and the bytes of every record."""
        (run,) = [run for run in list_runs(self.disk) if run.generation]
        with open_engine() as engine, Store.open([self.disk], engine=engine, run_id=run.run_id) as store:
            records = {name: bytearray(spec.nbytes) for name, spec in store.records.items()}
            for name, memory in records.items():
                store.read(name, memory).wait()
            return self.losses, dict(store.state), {name: bytes(data) for name, data in records.items()}


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    trainer = Trainer()
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def unbroken(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(trainer, tmp_path_factory.mktemp("unbroken"))
    run.measure()
    return run


@pytest.fixture(scope="module")
def expected(unbroken: Run) -> Any:
    return unbroken.result()


# Updates run between passes, overlapped with the next forward.
PARKED = {"max_grad_norm": 0.25}
# The least host memory with which it runs: every gradient goes to disk first.
PARKED_ON_DISK = {**PARKED, "activations_nbytes": 1 << 18, "host_memory": 499_712}
# What lies in the folder of a run.
NAMES = re.compile(r"OFFLOAD_RUN|lock|data\.bin|manifest-\d+(\.tmp)?")


@pytest.fixture(scope="module")
def parked(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = Run(trainer, tmp_path_factory.mktemp("parked"), settings=PARKED)
    run.measure()
    return run.result()


# Random numbers round them: a resumed run must draw those that it would have drawn.
CODED = {"moments": "8bit"}


@pytest.fixture(scope="module")
def coded(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = Run(trainer, tmp_path_factory.mktemp("coded"), settings=CODED)
    run.measure()
    return run.result()


def test_a_run_killed_at_random_moments_ends_like_an_unbroken_one(
    trainer: Trainer, unbroken: Run, expected: Any, tmp_path: Path
) -> None:
    rng = random.Random(3)
    run = Run(trainer, tmp_path, unbroken.import_s, unbroken.step_s)
    for moment in sorted(rng.uniform(-1, STEPS - 1) for _ in range(KILLS)):
        assert run.attempt(kill_at=moment) == -signal.SIGKILL
    assert run.attempt() == 0
    losses, state, records = run.result()
    assert losses == expected[0]
    assert state == expected[1]
    assert records == expected[2]


@pytest.mark.parametrize(
    "point",
    [
        ("import", 1),
        ("import", 9),
        ("write", 1),
        ("write", 9),
        ("before sync", 1),
        ("after sync", 1),
        ("before rename", 2),
        ("after rename", 2),
    ],
    ids=lambda point: f"{point[0]} {point[1]}",
)
def test_a_run_that_dies_at_a_point_ends_like_an_unbroken_one(
    trainer: Trainer, expected: Any, tmp_path: Path, point: tuple[str, int]
) -> None:
    run = Run(trainer, tmp_path)
    assert run.attempt(die=point) == -signal.SIGKILL
    assert run.attempt() == 0
    assert run.result() == expected


# Of the steps since the last commit nothing is left, wherever the records are at home.
RARELY = [{"save_steps": 3}, {"save_steps": 3, "home": "host"}, {"save_steps": 2, "home": "device"}]


@pytest.mark.parametrize("settings", RARELY, ids=str)
@pytest.mark.parametrize(
    "point",
    [("backward", 2), ("write", 5), ("before sync", 2), ("before rename", 1), ("after rename", 2)],
    ids=lambda point: f"{point[0]} {point[1]}",
)
def test_a_run_with_few_commits_that_dies_ends_like_an_unbroken_one(
    trainer: Trainer, expected: Any, tmp_path: Path, point: tuple[str, int], settings: dict[str, Any]
) -> None:
    run = Run(trainer, tmp_path, settings=settings)
    assert run.attempt(die=point) == -signal.SIGKILL
    assert run.attempt() == 0
    assert run.result() == expected


def test_clipping_changes_the_run(expected: Any, parked: Any) -> None:
    assert parked[2] != expected[2]


@pytest.mark.parametrize(
    "point",
    [
        ("backward", 1),  # every gradient is there, nothing was updated
        ("write", 1),  # the first of the updates
        ("write", 4),  # in the middle of them
        ("before sync", 2),
        ("after rename", 1),
    ],
    ids=lambda point: f"{point[0]} {point[1]}",
)
def test_a_run_that_parks_gradients_and_dies_ends_like_an_unbroken_one(
    trainer: Trainer, parked: Any, tmp_path: Path, point: tuple[str, int]
) -> None:
    run = Run(trainer, tmp_path, settings=PARKED)
    assert run.attempt(die=point) == -signal.SIGKILL
    assert run.attempt() == 0
    assert run.result() == parked


@pytest.mark.parametrize(
    "point",
    [
        ("write", 2),  # in the midst of the gradients of a step
        ("write", 11),  # and of its updates
        ("backward", 1),  # every gradient was handed over
    ],
    ids=lambda point: f"{point[0]} {point[1]}",
)
def test_a_run_that_parks_gradients_on_disk_and_dies_leaves_none_and_ends_like_an_unbroken_one(
    trainer: Trainer, parked: Any, tmp_path: Path, point: tuple[str, int]
) -> None:
    run = Run(trainer, tmp_path, settings=PARKED_ON_DISK)
    assert run.attempt(die=point) == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert [name for name in os.listdir(folder) if not NAMES.fullmatch(name)] == []
    assert run.attempt() == 0
    assert run.result() == parked


def test_a_run_that_parks_gradients_on_disk_and_is_killed_at_random_moments(
    trainer: Trainer, unbroken: Run, parked: Any, tmp_path: Path
) -> None:
    rng = random.Random(4)
    run = Run(trainer, tmp_path, unbroken.import_s, unbroken.step_s, settings=PARKED_ON_DISK)
    for moment in sorted(rng.uniform(0, STEPS - 1) for _ in range(KILLS // 2)):
        assert run.attempt(kill_at=moment) == -signal.SIGKILL
        (folder,) = tmp_path.iterdir()
        assert [name for name in os.listdir(folder) if not NAMES.fullmatch(name)] == []
    assert run.attempt() == 0
    assert run.result() == parked


def test_8bit_moments_change_the_run(expected: Any, coded: Any) -> None:
    assert coded[0] != expected[0]
    sizes = [sum(len(data) for data in result[2].values()) for result in (coded, expected)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    "point",
    [
        ("import", 9),
        ("backward", 1),
        ("write", 1),
        ("write", 9),
        ("before sync", 2),
        ("before rename", 2),
        ("after rename", 1),
    ],
    ids=lambda point: f"{point[0]} {point[1]}",
)
def test_a_run_with_8bit_moments_that_dies_ends_like_an_unbroken_one(
    trainer: Trainer, coded: Any, tmp_path: Path, point: tuple[str, int]
) -> None:
    run = Run(trainer, tmp_path, settings=CODED)
    assert run.attempt(die=point) == -signal.SIGKILL
    assert run.attempt() == 0
    assert run.result() == coded


def test_a_run_with_8bit_moments_killed_at_random_moments_ends_like_an_unbroken_one(
    trainer: Trainer, unbroken: Run, coded: Any, tmp_path: Path
) -> None:
    rng = random.Random(4)
    run = Run(trainer, tmp_path, unbroken.import_s, unbroken.step_s, settings=CODED)
    for moment in sorted(rng.uniform(-1, STEPS - 1) for _ in range(KILLS // 2)):
        assert run.attempt(kill_at=moment) == -signal.SIGKILL
    assert run.attempt() == 0
    assert run.result() == coded


@pytest.mark.parametrize(
    ("die", "stands"),
    [
        (("write", 2), False),
        (("backward", 3), False),
        (("before rename", 1), False),
        (("after rename", 1), True),
    ],
)
def test_a_killed_run_without_commits_is_refused_unless_its_end_was_committed(
    trainer: Trainer, expected: Any, tmp_path: Path, die: tuple[str, int], stands: bool
) -> None:
    run = Run(trainer, tmp_path, settings={"commit": False})
    assert run.attempt(die=die) == -signal.SIGKILL
    (left,) = list_runs(tmp_path)
    assert left.is_lost is not stands
    # Refused before a step, or without one to do.
    assert run.attempt() == (0 if stands else 1)
    if stands:
        assert (run.losses, run.result()[2]) == (expected[0], expected[2])
